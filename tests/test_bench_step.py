"""The benchmark of a whole step: both sides give the same loss, or it ends with an error."""

import re
import runpy
import sys

import pytest
from conftest import ROOT


def test_both_sides_have_the_same_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffsort", reason="runs where diffsort is installed")
    small = ["--small", "--size", "56", "--batch", "2", "--repeats", "1", "--threads", "1", "--profile"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *small])
    runpy.run_path(str(ROOT / "scripts" / "bench_step.py"), run_name="__main__")
    said = capsys.readouterr().out
    ours, theirs = map(float, re.search(r"pixels: ([\d.]+), published ([\d.]+)", said).groups())
    assert ours == pytest.approx(theirs, rel=1e-5) and ours > 1
    shares = [int(share) for share in re.findall(r"^[a-z ,]+ +[\d.]+ +(\d+)%$", said, re.MULTILINE)]
    assert len(shares) == 7 and 95 < sum(shares) < 105 and shares[0] and shares[2]
    assert float(re.search(r"^both +[\d.]+ +[\d.]+ +([\d.]+)", said, re.MULTILINE)[1]) > 0
