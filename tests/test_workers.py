"""Batches of data workers come through /dev/shm or, where that is too small, pipes; a worker's end is one line."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader

from neco.distributed import workers
from neco.utils.errors import NecoError

READ = """
import torch
from torch.utils.data import DataLoader
from neco.distributed import workers

class Items:
    def __len__(self): return 8
    def __getitem__(self, index): return {"image": torch.full((3, 400, 400), index, dtype=torch.uint8), "n": index}

for collate in (workers.stack, list):
    loader = DataLoader(Items(), 4, num_workers=2, collate_fn=collate, worker_init_fn=workers.start_worker, timeout=60)
    for batch in loader:
        images = batch["image"] if collate is workers.stack else torch.stack([item["image"] for item in batch])
        print(images[:, 0, 0, 0].tolist(), int(images.float().mean() * 4))
"""


def test_batches_that_do_not_fit_into_shared_memory_go_through_pipes():
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("runs where a process may mount a small /dev/shm of its own: as root on Linux")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, READ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[0, 1, 2, 3] 6", "[4, 5, 6, 7] 22"] * 2
    said = done.stderr.splitlines()
    assert len(said) == 2, "once a loader"
    assert all(line.startswith("/dev/shm has 1 MB, not enough for batches of images") for line in said)
    assert all("docker run --shm-size=8g" in line and "train.workers" in line for line in said)


class Ends(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        os._exit(3)


def test_the_end_of_a_worker_is_one_line():
    loader = DataLoader(Ends(), num_workers=1, worker_init_fn=workers.start_worker)
    said = r"gone or hangs \(DataLoader worker .* lower the number of workers"
    with pytest.raises(NecoError, match=said), workers.named_workers():
        next(iter(loader))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is ...",
            r"Bus error\).*--shm-size",
        ),
        ("received 0 items of ancdata", r"ancdata\)\. Too many files are open: raise the limit \(ulimit -n"),
    ],
)
def test_what_ended_it_is_named(said, message):
    with pytest.raises(NecoError, match=message) as error, workers.named_workers():
        raise RuntimeError(said)
    assert "\n" not in str(error.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), workers.named_workers():
        raise RuntimeError("shapes")
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        workers.stack([torch.zeros(1), torch.zeros(2)])
