"""A few trials of whole runs; one file, for they share the process that runs are forked from."""

from pathlib import Path

import pytest
import soak

TOPICS = "kills", "disk", "processes", "determinism", "long"
TRIALS = [trial for topic in TOPICS for trial in soak.trials(topic) if trial.small]


@pytest.mark.slow
@pytest.mark.parametrize("trial", TRIALS, ids=[f"{trial.topic}-{trial.name}" for trial in TRIALS])
def test_trial(trial, tmp_path: Path):
    assert len([*trial(tmp_path, trial.small)]) > 0
