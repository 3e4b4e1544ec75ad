"""Text stays text in every format that a report is written in."""

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from neco.report import latex, model_card
from neco.report.tables import Table
from neco.utils import escape
from neco.utils.text_table import columns, markdown

NAMES = (
    '</script><img src=x onerror="alert(1)">', "=HYPERLINK(1)", "+1+cmd|' /C'!A0", "-2+3", "@SUM(1)", "\t=1+1",
    "[5cm] a", "* b", "a | b \\| c \\", "`x` ``y``", "# head", "- item", "1. item", "![a](http://x.y/z)", "<b>&amp;",
    "$x$ % _a_ {b}",
    "\x1b[2J\x07", "a\nb\r\nc", "\u202egnp.exe", "@user https://x.y www.x.y", "~~~", "", "^^M", "é中",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_html_gives_the_text_back(name: str) -> None:
    found: list[tuple[str, object]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs) -> None:
            found.append((tag, attrs))

        def handle_data(self, data) -> None:
            found.append(("", data))

    text = escape.for_html(name)
    parser = Parser()
    parser.feed(f'<p title="{text}">{text}</p>')
    parser.close()
    shown = escape.make_printable(name)
    assert found[0] == ("p", [("title", shown)]) and "".join(str(data) for _, data in found[1:]) == shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text.replace("\r", ""))


@pytest.mark.parametrize("name", NAMES)
def test_spreadsheets_see_no_formula(name: str) -> None:
    for number in ("-3.6", "+5.2", "1e-5", "nan", ""):
        assert escape.for_csv(number) == number
    text = Table("t", ["run", name], [[name, "-3.6"], ["a", "+5.2"]]).csv()
    (_, head), (cell, low), (_, high) = csv.reader(io.StringIO(text))
    assert (low, high) == ("-3.6", "+5.2") and head == cell
    assert not re.match(r"\s*[=+\-@]", cell) and "\n" not in cell


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_markdown_is_one_row(name: str) -> None:
    rows = markdown([["a", "b"], [name, name]]).splitlines()
    assert len(rows) == 3 and len(re.findall(r"(?<!\\)(?:\\\\)*\|", rows[2])) == 3
    text = escape.for_markdown(name)
    assert not re.search(r"(?<!\\)(?:\\\\)*[<>`*\[\]#$@~]", text) and "://" not in text
    assert not re.match(r"([-+]|\d+\.)( |$)", text)
    code = escape.markdown_code(name)
    if fence := re.match("`+", code):
        assert code.endswith(fence[0]) and not re.search(
            rf"(?<!`){fence[0]}(?!`)", code[len(fence[0]) : -len(fence[0])]
        )
    block = escape.markdown_block(f"```\n{name}").splitlines()
    assert block[0] == block[-1] == "````"


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_keeps_its_rows(name: str) -> None:
    lines = columns([["a", "b"], [name, "1"]]).splitlines()
    assert len(lines) == 3 and "\x1b" not in "".join(lines)


def test_latex_keeps_rows_and_cells(tmp_path) -> None:
    table = Table(f"caption {NAMES[6]}", ["run", "value"], [[name, "-1.0"] for name in NAMES])
    text = latex.latex([table])
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(NAMES) + 1 and not any(re.match(r"\s*[\[*]", row) for row in rows)
    assert all(len(re.findall(r"(?<!\\)&", row)) == 1 for row in rows)
    if not (program := shutil.which("pdflatex")):
        pytest.skip("pdflatex is not installed: the rows above are checked, not the print")
    head = "\\documentclass{article}\\usepackage[utf8]{inputenc}\\usepackage{booktabs,graphicx}\\begin{document}"
    (tmp_path / "a.tex").write_text(f"{head}\n{text.replace('中', '')}\n\\end{{document}}")
    done = subprocess.run([program, "-interaction=batchmode", "-halt-on-error", "a.tex"], cwd=tmp_path)
    assert done.returncode == 0


@pytest.mark.parametrize("name", NAMES[:-2])
def test_a_model_card_says_names_and_obeys_none(name: str) -> None:
    record = {"dataset": name, "split": name, "evaluation": name, "protocol": name, "metrics": {name: 0.3333}}
    table = model_card._numbers([record]).splitlines()
    assert len(table) == 5 and len(re.findall(r"(?<!\\)(?:\\\\)*\|", table[-1])) == 7 and "33.33" in table[-1]
    place = {"choices": {"dataset": name}, "git": name, "packages": {"neco": name, "torch": name}, "device": name}
    text = model_card._training(model_card.Training("train", name, "auto", {name: (name, name)}, place))
    for plain in (re.sub(r"(`+).*?(?<!`)\1(?!`)", "", part, flags=re.DOTALL) for part in (*table, text)):
        found = plain.replace("[arXiv 2408.11054](https://arxiv.org/abs/2408.11054)", "")
        assert not re.search(r"(?<!\\)(?:\\\\)*[<>\[\]#$@]", found) and "://" not in found, found
