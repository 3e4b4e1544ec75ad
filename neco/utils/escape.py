"""Text as each format shows it, and as nothing more: the only place where a format's own signs are escaped."""

import html
import re

from neco.utils.masking import make_printable, one_line

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
_LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {c: f"{{{c}}}" for c in "[]*"}  # at the beginning of a row they would be read as options of \\


def for_html(text: str) -> str:
    """Return the text for an HTML element or a quoted attribute."""
    return html.escape(make_printable(text))


def for_markdown(text: str) -> str:
    """Return the text in one line of GitHub's Markdown: no emphasis, link, mention, formula or HTML begins in it."""
    text = re.sub(r"([\\`*<>\[\]#~$@]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(one_line(text).split()))
    return re.sub(r"^([-+=]|\d+[.)])(?=\s|$|[-=])", r"\\\1", text.replace("&", "&amp;").replace("://", ":\\//"))


def markdown_code(text: str) -> str:
    """Return the text as code within a line of Markdown, also of a table."""
    text = one_line(text)
    if "\\" in text and "|" in text:  # no table takes both in code
        return for_markdown(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{fence}{space}{text}{space}{fence}" if text.strip() else ""


def markdown_block(text: str, language: str = "") -> str:
    """Return the text as a block of code, which nothing in it can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{make_printable(text).rstrip()}\n{fence}"


def markdown_table(rows: list[list[str]]) -> str:
    """Return a table of GitHub's kind, whose cells are Markdown; the first row is its head."""
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def for_latex(text: str) -> str:
    """Return the text as LaTeX prints it."""
    return "".join(_LATEX.get(letter, letter) for letter in one_line(text))


def for_csv(cell: object) -> object:
    """Return a cell that spreadsheets take for text or a number, not for a formula."""
    if not isinstance(cell, str):
        return cell
    try:
        float(cell)
    except ValueError:
        return (
            f"'{one_line(cell)}"
            if cell.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠"))
            else one_line(cell)
        )
    return cell
