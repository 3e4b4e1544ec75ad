"""The benchmark of evaluations: the published procedures, written out there, give what ours do."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_eval.py"
spec = importlib.util.spec_from_file_location("bench_eval", SCRIPT)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
SIZES = {
    "train": 6,
    "val": 4,
    "size": 112,
    "dim": 32,
    "k": 30,
    "clusters": 40,
    "pixels": 5000,
    "nodes": 30,
    "repeat": 1,
}
SMALL = [f"--{name}={value}" for name, value in SIZES.items()]
CASES = bench.cases(bench.parse(["all", *SMALL]))


@pytest.mark.parametrize("name", CASES)
def test_both_sides_agree(name: str) -> None:
    pytest.importorskip("faiss", reason="runs where faiss is installed")
    case = CASES[name]
    inputs = case.inputs()
    plain, ours = case.plain(inputs), case.ours(inputs)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=case.tolerance)
    assert np.ptp(plain) or 0.02 < plain < 0.98, "an easy answer tells nothing"


def test_a_difference_is_no_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="runs where faiss is installed")
    monkeypatch.setattr(bench, "ProcessPoolExecutor", ThreadPoolExecutor)  # processes take seconds to start
    monkeypatch.setattr(sys, "argv", ["bench_eval.py", "matching", *SMALL])
    bench.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("matching")]
    assert len(rows) == 2 and all(row[-3] == row[-2] for row in rows)
    monkeypatch.setattr(bench, "plain_miou", lambda *_, **__: 0.5)
    with pytest.raises(SystemExit, match="matching one to one: the results differ by 0"):
        bench.main()
