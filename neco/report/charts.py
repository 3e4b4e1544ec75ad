"""Charts as SVG, drawn by hand: sized in their own units, coloured by page.css, named for screen readers."""

import math
from collections.abc import Mapping, Sequence

from neco.report.collect import Point
from neco.utils.escape import for_html

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 220, 46, 12, 10, 38
POINTS = 150  # of a line, more are averaged
COLOURS = 6  # of page.css


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers in low..high, about so many."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(line: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, int]]:
    """At most POINTS points of a line, each the mean of its neighbours."""
    size = -(-len(line) // POINTS)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(*(sum(values) / len(part) for values in zip(*part, strict=True)), 0.0, len(part)) for part in parts]  # type: ignore[misc]


def chart(
    title: str,
    key: str,
    lines: Mapping[str, Sequence[Point]],
    categories: Sequence[str] = (),
    marked: bool = False,
    connected: bool = True,
) -> str:
    """A figure of lines over `key`, with bars of their deviations; `before` is dashed. Marked: every point is drawn.

    Points that are not comparable are not connected.

    A key whose values span more than 50 to one has a logarithmic axis. Infinite and missing values are left out.
    """
    lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    xs = sorted({point[0] for point in points})
    wide = xs[0] > 0 and xs[-1] > 50 * xs[0] and marked and not categories
    low, high = min(y - std for _, y, std, _ in points), max(y + std for _, y, std, _ in points)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    scale = math.log if wide else float
    first, last = (-0.5, len(categories) - 0.5) if categories else (scale(xs[0]), scale(xs[-1]))

    def across(x: float) -> float:
        part = (scale(x) - first) / (last - first) if last > first else 0.5
        return round(LEFT + part * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    parts = []
    for y in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {up(y)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(y) + 4}" text-anchor="end">{y:.6g}</text>')
    names = xs if marked and (len(xs) <= 7 or categories) else ticks(xs[0], xs[-1]) if len(xs) > 1 else xs
    for x in names:
        name = categories[int(x)] if categories else f"{x:.6g}"
        anchor = "end" if across(x) + 4 * len(name) > WIDTH else "middle"
        name = name if len(name) <= 14 else name[:12] + "…"
        parts.append(f'<text x="{across(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{for_html(name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{for_html(key)}</text>')
    for colour, (name, line) in zip(_styles(lines), lines.items(), strict=True):
        path = "M" + "L".join(f"{across(x)} {up(y)}" for x, y, _, _ in line)
        parts.append(f'<g class="{colour}">')
        parts += [f'<path class="line" d="{path}"/>'] if line and connected and not categories else []
        for x, y, std, count in line if marked else ():
            at, value = across(x), f"{y:.1f}" + (f" ± {std:.1f} of {count}" if count > 1 else "")
            parts += [f'<path class="bar" d="M{at} {up(y - std)}V{up(y + std)}"/>'] if std else []
            told = f"{name}, {categories[int(x)] if categories else f'{x:.6g}'}: {value}"
            parts.append(f'<circle cx="{at}" cy="{up(y)}" r="3.5"><title>{for_html(told)}</title></circle>')
        parts.append("</g>")
    ends = "; ".join(f"{name}: {first_and_last(line[0][1], line[-1][1])}" for name, line in lines.items() if line)
    ends = ends if len(lines) > 1 else ends.partition(": ")[2]
    described = for_html(f"{title} over {key}. {ends}.")
    legend = "".join(
        f'<li class="{colour}"><svg viewBox="0 0 22 8" aria-hidden="true"><path class="line" d="M1 4H21"/></svg>'
        f"{for_html(name)}</li>"
        for colour, name in zip(_styles(lines), lines, strict=True)
    )
    return (
        f'<figure class="chart"><figcaption>{for_html(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg>'
        + (f'<ul class="legend">{legend}</ul>' if len(lines) > 1 else f'<p class="ends">{for_html(ends)}</p>')
        + "</figure>"
    )


def pair(before: float | None, after: float | None) -> str:
    """A bar from one share (0..1) to another, for a cell of a table that names both."""
    start, end = (None if v is None else round(4 + 112 * v, 1) for v in (before, after))
    parts = ['<path class="grid" d="M4 7H116"/>']
    if start is not None and end is not None:
        parts.append(f'<path class="span{" worse" if end < start else ""}" d="M{start} 7H{end}"/>')
    for at, kind in ((start, "was"), (end, "is")):
        parts += [f'<circle class="{kind}" cx="{at}" cy="7" r="4"/>'] if at is not None else []
    return f'<svg class="pair" viewBox="0 0 120 14" aria-hidden="true">{"".join(parts)}</svg>'


def _styles(lines: Mapping[str, object]) -> list[str]:
    """Classes of page.css: grey and dashed for what was before."""
    number, found = 0, []
    for name in lines:
        found.append("before" if name.endswith("before") else f"c{number % COLOURS}")
        number += found[-1] != "before"
    return found


def first_and_last(first: float, last: float) -> str:
    """`0.9995 to 1`: as many digits as tell the two apart, and shares near 1 from 1; at least three."""
    for digits in range(3, 8):
        texts = [f"{value:.{digits}g}" for value in (first, last)]
        near = all(abs(float(t) - v) <= 0.01 * abs(1 - v) for t, v in zip(texts, (first, last), strict=True) if v < 1)
        if near and (texts[0] != texts[1] or first == last):
            break
    return " to ".join(_thousands(value, text) for value, text in zip((first, last), texts, strict=True))


def _thousands(value: float, text: str) -> str:
    return text if abs(value) < 1000 else f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:.4g}k"
