"""The same seed gives the same weights and results: again, with any number of data workers, evaluated or not."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from soak import Outcome, kills, life, trial

CHOICES = (
    ("loss=neco", "loss=infonce", "loss=leopart loss.prototypes=8", "loss.references=queue loss.queue_size=64"),
    ("train.teacher=ema", "train.teacher=none", "train.teacher=head_ema"),
    ("train.accumulate=1", "train.accumulate=2"),
    ("train.precision=fp32", "train.precision=bf16"),
    ("augment.multi_scale=[1.0]", "augment.multi_scale=[0.5,1.0]"),
    ("train.lora_rank=0", "train.lora_rank=2"),
)
FREE = (  # what cannot change the training
    ("eval=[]", "eval=[overcluster] eval.overcluster.k=4", "eval=[overcluster,retrieval] eval.retrieval.k=3"),
    ("train.eval_epochs=0", "train.eval_epochs=1"),
    ("train.log_steps=1", "train.log_steps=4"),
    ("train.save_minutes=1e-9", "train.save_minutes=60"),
)
BASE = [option for option in life.TINY if not option.startswith("eval")]


@trial(small=1, full=25)
def same(rng: random.Random, folder: Path, count: int) -> Iterator[Outcome]:
    for number in range(count):
        chosen, found = " ".join(rng.choice(options) for options in CHOICES).split(), []
        workers = rng.randrange(1, 4)
        for many in (0, workers):
            free = " ".join(rng.choice(options) for options in FREE).split()
            run = folder / f"{number} {many}"
            ended = life.live(run, [*BASE, "train.steps=6", *chosen, *free, f"train.workers={many}", "run_dir=run"])
            assert ended.code == 0, ended.said
            found.append(kills.state(run))
        one, other = found
        assert one.keys() == other.keys() and len(one) > 40
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], (chosen, free)
        yield Outcome(f"0 or {workers} data workers; other evaluations, saves, rows", "the same weights, bit for bit")
