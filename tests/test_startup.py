"""The log says where the seconds before the first step went."""

import re

import pytest
from conftest import SMALL

from neco.utils import startup


def test_stages_add_up_and_a_second_job_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.5, 10.0, 12.0])
    monkeypatch.setattr(startup, "_marks", [("", next(times))])
    monkeypatch.setattr(startup.time, "monotonic", lambda: next(times))
    startup.begin()
    startup.mark("imports")
    assert startup.told() == "3.5 s: Hydra 1.0, imports 2.5"
    startup.begin()
    startup.mark("imports")
    assert startup.told() == "2.0 s: imports 2.0"


def test_a_run_logs_them_once(inside) -> None:
    code, text = inside(*SMALL, "train.steps=2", "eval=[]", "run_dir=run")
    assert code == 0, text
    (line,) = re.findall(r"start-up +([\d.]+) s: (.*)", text)
    seconds = [float(part.rpartition(" ")[2]) for part in line[1].split(", ")]
    assert "imports" in line[1] and line[1].endswith(f"first step {seconds[-1]}")
    assert sum(seconds) == pytest.approx(float(line[0]), abs=0.1 * len(seconds))
