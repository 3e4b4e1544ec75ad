"""A report as markdown."""

import re
from collections.abc import Iterable

from neco.report.tables import Table
from neco.results import markdown as rows_as_markdown


def escape(text: str) -> str:
    """Text as GitHub shows it."""
    return re.sub(r"([\\`*<>\[\]#~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def markdown(title: str, tables: Iterable[Table]) -> str:
    """Headings, tables and notes."""
    parts = [f"# {escape(title)}\n"]
    for table in tables:
        parts += [
            f"## {escape(table.title)}\n",
            rows_as_markdown([[*map(escape, r)] for r in (table.head, *table.rows)]),
        ]
        parts += [f"{escape(note)}\n" for note in table.notes]
    return "\n".join(parts)
