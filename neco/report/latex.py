"""The tables of a report for LaTeX, with booktabs; wide ones are shrunk to a line, long cells have lines."""

import re
from collections.abc import Iterable

from neco.report.tables import Table
from neco.utils.escape import for_latex

LONG = 60  # letters of a cell
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def latex(tables: Iterable[Table]) -> str:
    """A `table` each, to be included where `booktabs` and `graphicx` are loaded."""
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(_table(table) for table in tables)


def _table(table: Table) -> str:
    kinds = "".join(_kind(table, i) for i in range(len(table.head)))
    head, *rows = (" & ".join(map(_cell, row)) + r" \\" for row in (table.head, *table.rows))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{for_latex(table.title)}}}",
        FIT,
        rf"\begin{{tabular}}{{{kinds}}}",
    ]
    lines += [r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\par\footnotesize {for_latex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}", ""])


def _kind(table: Table, column: int) -> str:
    long = max((len(row[column]) for row in table.rows), default=0) > LONG
    return "p{9cm}" if long else "r" if table.numeric(column) else "l"


def _cell(text: str) -> str:
    """Numbers have a minus instead of a hyphen."""
    return f"${text}$" if re.fullmatch(r"[-+][\d.]+", text) else for_latex(text)
