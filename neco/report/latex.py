"""The tables of a report for LaTeX, with booktabs."""

from collections.abc import Iterable

from neco.report.tables import Table

ESCAPED = {c: f"\\{c}" for c in "&%$#_{}"}
ESCAPED |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
ESCAPED |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ", "\r": " "}


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(ESCAPED.get(letter, letter) for letter in text)


def latex(tables: Iterable[Table]) -> str:
    """A `table` each, to be included where `booktabs` is loaded."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_table(table) for table in tables)


def _table(table: Table) -> str:
    kinds = "".join("r" if table.numeric(i) else "l" for i in range(len(table.head)))
    head, *rows = (" & ".join(map(escape, row)) + r" \\" for row in (table.head, *table.rows))
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escape(table.title)}}}", rf"\begin{{tabular}}{{{kinds}}}"]
    lines += [r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {escape(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}", ""])
