"""Tables of text."""

from neco.utils import escape
from neco.utils.masking import one_line


def markdown(rows: list[list[str]]) -> str:
    """Rows of text as a table of GitHub's kind."""
    return escape.markdown_table([[escape.for_markdown(cell) for cell in row] for row in rows])


def columns(rows: list[list[str]]) -> str:
    """Rows of text as aligned columns, the first row underlined."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
