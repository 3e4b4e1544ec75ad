"""A report as markdown."""

from collections.abc import Iterable

from neco.report.tables import Table
from neco.utils.escape import for_markdown
from neco.utils.text_table import markdown as rows_as_markdown


def markdown(title: str, tables: Iterable[Table]) -> str:
    """Headings, tables and notes."""
    parts = [f"# {for_markdown(title)}\n"]
    for table in tables:
        parts += [
            f"## {for_markdown(table.title)}\n",
            rows_as_markdown([table.head, *table.rows]),
        ]
        parts += [f"{for_markdown(note)}\n" for note in table.notes]
    return "\n".join(parts)
