"""Imported by the process that lives are forked from: a whole run, so that all is loaded that one needs."""

import os
import sys
import tempfile
from pathlib import Path

import torch

from neco.cli import main as program
from soak.life import TINY

torch.set_num_threads(1)
said, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(nothing, 2)
with tempfile.TemporaryDirectory() as folder:
    sys.argv = ["neco", *TINY, "train.steps=1", f"run_dir={Path(folder) / 'run'}", f"cache_dir={folder}"]
    program.main()
os.dup2(said, 2)
