"""The pages of benchmarks, and the scripts that no other test runs."""

import argparse
import importlib
import shlex
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")


def run(monkeypatch: pytest.MonkeyPatch, script: str, command: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(command)])
    importlib.import_module(script).main()


def test_features_are_searched_clustered_and_extracted(scripts, monkeypatch, capsys) -> None:
    pytest.importorskip("faiss", reason="runs where faiss is installed")
    run(monkeypatch, "bench_features", "retrieval kmeans extract --small --beside --workers 0 --images 3")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["retrieval", "k-means", "extraction"]
    assert "as faiss flat" in lines[-3] and "faiss on the CPU" in lines[-2] and lines[-1].endswith("%")


def test_a_wrong_neighbour_is_no_result(scripts, monkeypatch) -> None:
    pytest.importorskip("faiss", reason="runs where faiss is installed")
    bench = importlib.import_module("bench_features")
    right = bench.Neighbours.__call__

    def wrong(self, queries, k):
        values, places = right(self, queries, k)
        return (values if self.engine == "faiss" else values - 1e-3), places

    monkeypatch.setattr(bench.Neighbours, "__call__", wrong)
    with pytest.raises(SystemExit, match="differ from faiss"):
        run(monkeypatch, "bench_features", "retrieval --small")


def test_a_page_holds_machine_commands_and_outputs(scripts, monkeypatch, tmp_path, capsys) -> None:
    bench = importlib.import_module("bench")
    command = "scale.py --help"
    for pages in ("CPU", "GPU"):
        monkeypatch.setattr(bench, pages, {"small": ("A title", [command])})
    run(monkeypatch, "bench", f"small --folder {tmp_path}")
    (page,) = tmp_path.glob("small_*.md")
    text = page.read_text()
    assert text.startswith("# A title\n") and f"python scripts/{command}" in text and "usage: scale.py" in text
    assert "torch" in text and "load" in text


def test_a_benchmark_that_fails_leaves_no_page(scripts, monkeypatch, tmp_path) -> None:
    bench = importlib.import_module("bench")
    for pages in ("CPU", "GPU"):
        monkeypatch.setattr(bench, pages, {"small": ("A title", ["scale.py --no-such-option"])})
    with pytest.raises(SystemExit, match="ended with 2"):
        run(monkeypatch, "bench", f"--folder {tmp_path}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("pages", ["CPU", "GPU"])
def test_every_command_is_understood(scripts, monkeypatch, pages) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *arguments):
        parse(self, *arguments)  # ends with 2 for what it does not know
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for _, commands in getattr(importlib.import_module("bench"), pages).values():
        for command in commands:
            name, _, rest = command.partition(" ")
            with pytest.raises(SystemExit) as end:
                run(monkeypatch, name.removesuffix(".py"), rest)
            assert end.value.code == 0, command
