"""A few of the trials of tests/soak/configs.py, others each day; `make soak` does all of them."""

from pathlib import Path

import pytest
import soak


@pytest.mark.parametrize("trial", soak.trials("configs"), ids=lambda trial: trial.name)
def test_trials(trial: soak.Trial, tmp_path: Path) -> None:
    assert len(trial(tmp_path, trial.small)) >= trial.small
