"""A report as one HTML page."""

import io
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from neco.report import charts, similarity, tables
from neco.report.collect import Plot, Point, Run, sweeps
from neco.report.gallery import Features
from neco.report.pages import HERE, address, drawn, encoded, figure, page, swatch
from neco.report.pictures import as_colours, colours, overlay
from neco.report.tables import Table
from neco.runs import foreign
from neco.utils.commands import format_command
from neco.utils.errors import NecoError
from neco.utils.escape import for_html
from neco.utils.masking import mask_nested, mask_secrets

log = logging.getLogger(__name__)
Drawing = tuple[dict[str, Any], dict[str, Any], bytes]  # a record, one of its pictures, the picture's file
PICTURES = 5_000_000  # bytes of pictures in a page
CURVES = 6  # runs whose curves are drawn
TITLES = {"train": "What post-training did", "finetune": "What fine-tuning gave", "eval": "What was measured"}
FIRST = ("loss", "kl", "agreement", "images_per_second")  # of the curves; of several runs no others


def title(runs: Sequence[Run]) -> str:
    """Of the whole report."""
    return f"{len(runs)} runs" if len(runs) > 1 else TITLES.get(str(runs[0].config.get("task")), "What was measured")


def write(path: Path, runs: Sequence[Run]) -> None:
    """The page of these runs."""
    plots = sweeps(runs) if len(runs) > 1 else []
    sections = {
        "Not done": [_table(tables.unfinished(runs))] if len(runs) > 1 else [],
        "Over settings": _sweeps(runs, plots),
        "Numbers": [_table(tables.headline(runs))],
        "Similarity": _similarity(runs),
        "Training": _curves(runs),
        "Classes": _classes(runs),
        "Pictures": _pictures(runs[0]) if len(runs) == 1 else [],
        "Time and memory": [_table(tables.costs(runs))],
        "How it was run": _setup(runs),
    }
    held = {name: [part for part in parts if part] for name, parts in sections.items()}
    held = {name: parts for name, parts in held.items() if parts}
    names = {name: name.lower().replace(" ", "-") for name in held}
    links = "".join(f'<li><a href="#{names[name]}">{name}</a></li>' for name in held)
    body = [*_lead(runs), f'<nav aria-label="Contents"><ul>{links}</ul></nav><main>']
    for name, parts in held.items():
        body += [f'<section aria-labelledby="{names[name]}"><h2 id="{names[name]}">{name}</h2>', *parts, "</section>"]
    page(path, title(runs), [*body, "</main>"])


def _lead(runs: Sequence[Run]) -> Iterator[str]:
    run = runs[0]
    if len(runs) > 1:
        return
    number = next(iter(run.result), None)
    about = [number.model, f"the {number.network}", f"on {number.dataset}"] if number else []
    about += [f"step {run.steps[1]}"] if run.records and run.steps[1] else []
    yield f'<p class="quiet">{for_html(", ".join([*filter(None, about), str(run.path)]))}</p><div class="cards">'
    for n in run.result[:6]:
        before = "" if n.before is None else f"<span>{n.before:.1f} →</span> "
        change = "" if n.before is None else f"{_change(n.value - n.before)} "
        name, metric = for_html(n.evaluation), for_html(n.metric)
        yield f'<div class="card">{name} <b>{before}{n.value:.1f}</b>{change}{metric}</div>'
    yield "</div>"


def _change(value: float) -> str:
    """A change in its colour, with an arrow: by colour alone not everybody sees which it is."""
    text = f"{round(value, 1) + 0:+.1f}"
    kind, arrow = ("better", "▲ ") if float(text) > 0 else ("worse", "▼ ") if float(text) < 0 else ("same", "")
    return f'<em class="{kind}">{arrow}{text}</em>'


def _cell(text: str, name: str) -> str:
    return _change(float(text)) if name == "change" and text else for_html(text)


def _table(table: Table, bars: Sequence[str] = ()) -> str:
    """A table that scrolls inside itself; `bars` are drawn behind the names of its rows."""
    if not table.rows:
        return ""
    kinds = [' class="number"' if table.numeric(i) else "" for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{kind}>{for_html(name)}</th>' for name, kind in zip(table.head, kinds, strict=True))
    head += "<td></td>" if bars else ""
    rows = []
    for row, bar in itertools.zip_longest(table.rows, bars):
        named = zip(row[1:], kinds[1:], table.head[1:], strict=True)
        cells = "".join(f"<td{kind}>{_cell(cell, name)}</td>" for cell, kind, name in named)
        rows.append(f'<tr><th scope="row">{for_html(row[0])}</th>{cells}{f"<td>{bar}</td>" if bar else ""}</tr>')
    notes = "".join(f"<li>{for_html(note)}</li>" for note in table.notes)
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{for_html(table.title)}">'
    return (
        f"{region}<table><thead><tr>{head}</tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>{f'<ul class=notes>{notes}</ul>' if notes else ''}"
    )


def _folded(summary: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{for_html(summary)}</summary>{body}</details>" if body else ""


def _sweeps(runs: Sequence[Run], plots: Sequence[Plot]) -> Iterator[str]:
    if plots:
        yield "<p>Means over the seeds; bars are standard deviations. Grey: before.</p>"
        shown = (charts.chart(p.title, p.key, p.lines, p.categories, marked=True, connected=p.connected) for p in plots)
        yield f'<div class="charts">{"".join(shown)}</div>'
        yield _folded(
            "These as tables", "".join(f"<h3>{for_html(t.title)}</h3>{_table(t)}" for t in map(tables.sweep, plots))
        )
    if len(runs) > 1:
        yield _folded("What the runs were told", _table(tables.settings(runs)))


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    trained = [run for run in runs if run.curves][:CURVES]
    columns = dict.fromkeys([name for name in FIRST if any(name in run.curves for run in trained)])
    if len(runs) == 1:
        columns |= dict.fromkeys(name for run in trained for name in run.curves if name != "epoch")
    groups: dict[str, list[str]] = {}
    for name in columns:
        groups.setdefault("learning rates" if name.startswith("lr_") else name, []).append(name)
    parts = []
    for head, names in groups.items():
        lines: dict[str, list[Point]] = {}
        for run, name in itertools.product(trained, names):
            label = ", ".join([*([run.label] if len(trained) > 1 else []), *([name] if len(names) > 1 else [])]) or name
            lines |= {label: charts.thinned(run.curves[name])} if name in run.curves else {}
        parts.append(charts.chart(head.replace("_", " "), "step", lines))
    progress: dict[str, dict[str, list[Point]]] = {}
    for run in runs[:CURVES]:
        for r in run.records if len({record["step"] for record in run.records}) > 2 else ():
            for metric, value in r["metrics"].items():
                label = ", ".join([*([run.label] if len(runs) > 1 else []), r["network"]])
                line = progress.setdefault(f"{r['evaluation']} {metric}, percent", {}).setdefault(label, [])
                line.append((float(r["step"]), 100 * value, 0.0, 1))
    parts = [charts.chart(head, "step", lines, marked=True) for head, lines in progress.items()] + parts
    if any(parts):
        if len(trained) < (count := sum(bool(run.curves) for run in runs)):
            yield f'<p class="quiet">Of the first {len(trained)} of {count} trainings.</p>'
        yield f'<div class="charts">{"".join(parts)}</div>'


def _classes(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for i, (number, table) in enumerate(tables.classes(run)):
            bars = [charts.pair(number.iou_before.get(row[0]), number.iou.get(row[0])) for row in table.rows]
            name = f"{run.label}: {table.title}" if len(runs) > 1 else table.title
            yield _folded(name, _table(table, bars), opened=len(runs) == 1 and not i)


def _name(run: Run, network: str, step: int) -> str:
    """Of a network at a step, for people."""
    kept = run.gallery.features if run.gallery else ()
    trained = any([*(record["step"] for record in run.records), *(part.step for part in kept)])
    return network if not trained else f"{network}, step {step}" if step else "before"


def _similarity(runs: Sequence[Run]) -> Iterator[str]:
    shown = [run for run in runs if run.gallery and run.gallery.features]
    if not shown or not (gallery := shown[0].gallery):
        yield '<p class="quiet">No features were kept: <code>show=N</code> keeps those of N images.</p>'
        return
    networks: dict[str, tuple[str, Features]] = {}
    for run in shown:
        same = run.gallery and (run.gallery.keys, run.gallery.classes) == (gallery.keys, gallery.classes)
        kept = run.gallery.features if run.gallery and same else ()
        counts = {number.network for number in run.result}
        for part in (part for part in kept if len(shown) == 1 or not part.step or part.network in counts):
            name = f"{run.label}: " * (len(shown) > 1) + _name(run, part.network, part.step)
            networks.setdefault(part.weights, (name, part))
    images = [address(encoded(image, 320)) for image in gallery.images]
    data, note = similarity.pack(gallery, [*networks.values()], images)
    names = [network["name"] for network in data["networks"]]
    selects = []
    for side, preset in (("left", 0), ("right", data["right"])):
        options = "".join(
            f'<option value="{i}"{" selected" * (i == preset)}>{for_html(n)}' for i, n in enumerate(names)
        )
        scale = '<span class="scale"><b></b><i></i>1</span>'
        selects.append(f"<div><label>{side} <select>{options}</select></label> {scale}</div>")
    yield (
        "<p>Choose a patch of any image, by a click, a touch or the arrow keys: every image then shows how alike its "
        "patches are to it, to the left and to the right as the two networks see it. Dark: unlike; bright: alike. "
        "The square is the patch, circles are the best match in each image.</p>"
        f'<div id="maps"><div class="controls">{"".join(selects)}<label><input type="checkbox" checked> '
        'colours from the lowest cosine of each network (else from 0)</label></div><output aria-live="polite"></output>'
        '<div class="pairs"></div></div><noscript><p>This part needs JavaScript.</p></noscript>'
        f'<p class="quiet">{for_html(note)}</p>'
    )
    if len(gallery.keys) > len(data["images"]) or len(networks) > len(names):
        told = f"{len(data['images'])} of {len(gallery.keys)} images and {len(names)} of {len(networks)} networks"
        yield f'<p class="quiet">The first {told}.</p>'
    text = json.dumps(data).replace("<", "\\u003c")  # no text can end the script
    yield f'<script type="application/json" id="similarity-data">{text}</script>'
    yield f"<script>{(HERE / 'page.js').read_text()}</script>"


def _pictures(run: Run) -> Iterator[str]:
    """What evaluations saw: of each image, then of all."""
    gallery, room = run.gallery, PICTURES
    if not gallery:
        return
    palette, left_out = colours(len(gallery.classes)), 0
    if gallery.classes:
        named = " ".join(swatch(*pair) for pair in zip(palette, gallery.classes, strict=True))
        yield f'<p class="swatches">{named}</p>'
    maps = as_colours([part.maps for part in gallery.features]) if gallery.features else []
    drawings = [*_drawings(run)]
    size = max(1, sum(len(data) for *_, data in drawings))
    shrink = min(1.0, (0.5 * room / size) ** 0.5)  # base64, and masks and features beside them
    for number, key in enumerate(gallery.keys):
        image, label = gallery.images[number], gallery.labels[number]
        figures = [drawn(image, f"image {key}", "image")]
        if gallery.classes:
            figures.append(drawn(overlay(image, label, palette), f"ground truth of {key}", "ground truth"))
        for part, colour in zip(gallery.features, maps, strict=True):
            told = f"principal components of features, {_name(run, part.network, part.step)}"
            source = address(encoded(colour[number], form="PNG"))
            figures.append(figure(source, f"{told}, of {key}", for_html(told), image.shape, "pixels"))
        body = f'<div class="pictures">{"".join(figures)}</div>{_drawn(run, drawings, key, shrink)}'
        if len(body) <= room:
            room -= len(body)
            yield _folded(key, body, opened=not number)
        else:
            left_out += 1
    if left_out:
        yield f'<p class="quiet">{left_out} more are in {for_html(str(run.path / "pictures"))}.</p>'
    yield _folded("Of all images", _drawn(run, drawings, None, 1.0))


def _drawings(run: Run) -> Iterator[Drawing]:
    """Record, picture and file of all that was drawn at the first and last step; equal networks have the same files."""
    seen = set()
    for record in run.records:
        for picture in record.get("pictures", []) if record["step"] in run.steps else []:
            if (name := picture["file"]) in seen:
                continue
            seen.add(name)
            try:
                if foreign.read_picture(run.path, name) is not None:
                    yield record, picture, foreign.read_bytes(run.path, name)
            except NecoError as error:
                log.warning("left out    %s", error)


def _drawn(run: Run, drawings: Sequence[Drawing], key: str | None, shrink: float) -> str:
    """What evaluations drew of an image (None: of all), a row for each kind."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for r, picture, data in drawings:
        if picture.get("key") == key:
            name = _name(run, r["network"], r["step"])
            if shrink < 1:
                pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                data = encoded(pixels, round(shrink * max(pixels.shape)))
            told = ", ".join(filter(None, [r["evaluation"], picture["kind"], name, picture.get("caption")]))
            made = figure(address(data), told + (f", of {key}" if key else ""), for_html(told))
            rows.setdefault((r["evaluation"], picture["kind"]), {}).setdefault(name, []).append(made)
    parts = []
    for (_, kind), by_network in rows.items():  # the same patch by all networks, then the next
        ordered = [made for patch in itertools.zip_longest(*by_network.values()) for made in patch if made]
        long = " long" if kind.startswith(("nearest", "confusion")) else ""
        parts.append(f'<div class="pictures{long}">{"".join(ordered)}</div>')
    return "".join(parts)


def _setup(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        place = run.environment
        parts = [f"<pre>{for_html(format_command(map(mask_secrets, run.told), python='python'))}</pre>"]
        facts = [[key, str(value)] for key, value in place.items() if not isinstance(value, dict)]
        facts += [[f"{name}, version", str(value)] for name, value in (place.get("packages") or {}).items()]
        parts.append(_folded("environment", _table(Table("environment", ["what", "value"], facts))))
        config = yaml.safe_dump(mask_nested(run.config), sort_keys=False)
        parts.append(_folded("config.yaml", f"<pre>{for_html(config)}</pre>"))
        yield _folded(run.label, "".join(parts), opened=len(runs) == 1)
