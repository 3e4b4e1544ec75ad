"""What a training says while it runs, in a terminal and without one, and that this costs no waiting."""

import fcntl
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import threading

import pytest
import torch
from conftest import ROOT, SMALL, losses
from torch import Tensor

from neco.utils import progress

LINE = (
    r"step (\d)/4  epoch [\d.]+/1\.333  loss [\d.]+  kl [\d.]+  [\d.]+ images/s  data wait \d+%  "
    r"mem [\d.]+ GB  eta 0:\d\d"
)


@pytest.mark.parametrize(("every", "steps"), [(1e-9, [1, 2, 3, 4]), (1e9, [4])])
def test_plain_lines_come_as_often_as_wanted(train, monkeypatch, caplog, every, steps) -> None:
    """Numbers are fetched when they are shown or logged and at no other step; rows keep to log_steps."""
    real, fetched = Tensor.__float__, []
    monkeypatch.setattr(Tensor, "__float__", lambda x: fetched.append(x) or real(x))
    monkeypatch.setattr(progress, "every", every)
    with caplog.at_level("INFO", "neco"):
        folder = train("train.log_steps=3")
    said = [re.fullmatch(LINE, record.message) for record in caplog.records if record.message.startswith("step ")]
    assert [int(line.group(1)) for line in said if line] == steps and all(said)
    assert losses(folder, "step") == [1, 3, 4]
    numbers = len({"loss", "kl", "entropy", "agreement", "grad_norm"})
    assert len(fetched) == 3 * numbers + 2 * (every < 1), "of step 2 what is shown, and nothing without a line"


def test_log_seconds_is_settable(inside) -> None:
    code, said = inside(*SMALL, "train.log_steps=9", "run_dir=run", "log_seconds=1e-6")
    assert code == 0 and len(re.findall(LINE, said)) == 4
    code, said = inside(*SMALL, "log_seconds=0")
    assert code == 2 and "log_seconds=0: input should be greater than 0" in said


def terminal(cache, folder, *overrides: str, keys: list[tuple[str, bytes]]) -> tuple[int, str]:
    """Run the program at a terminal; each of `keys` is typed once its pattern was seen after the one before."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (40, 100))
    with subprocess.Popen(
        [sys.executable, "-m", "neco", *overrides], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        os.close(theirs)
        said, seen = b"", 0
        limit = threading.Timer(200, process.kill)
        limit.start()
        while True:
            try:
                said += os.read(ours, 65536)
            except OSError:  # its end
                break
            if keys and re.search(keys[0][0].encode(), said[seen:]):
                os.write(ours, keys.pop(0)[1])
                seen = len(said)
        limit.cancel()
    os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[\d;?]*\w", "", said.decode())


@pytest.mark.slow
def test_ctrl_c_at_a_terminal(cache, tmp_path) -> None:
    """In training the step is saved, and the command that goes on printed; in an evaluation at once."""
    many = ["train.steps=9999", "train.eval_epochs=9999", "run_dir=run", "logger=[csv,wandb]"]
    code, said = terminal(cache, tmp_path, *SMALL[:-2], "eval=[]", *many, keys=[(r"(?s)loss.*loss.*loss", b"\x03")])
    assert code == 130 and "stopping when this step is done and saved; once more: at once" in said
    assert re.search(
        r"training .*/9999 .*eta.*\s+epoch .*  loss \d\.\d+  kl \d\.\d+  .* images/s  data wait \d+%  mem ",
        said,
    ), said
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True, mmap=True)
    assert last["global_step"] == len(losses(tmp_path / "run")) < 9999
    again = shlex.split(said.split("To go on: python -m neco ")[1])
    assert again[-1] == f"run_dir={tmp_path / 'run'}"
    slow = ["eval=linear", "eval.linear.epochs=9999", "eval.linear.batch_size=4", "train.eval_epochs=3"]
    again = [o for o in again if not o.startswith(("eval=", "train.eval_epochs="))]
    keys = [(r"features of train, epoch 2", b"\x03")]
    code, said = terminal(cache, tmp_path, *again, *slow, keys=keys)
    assert code == 130 and "saved in" in said and "step is done" not in said
