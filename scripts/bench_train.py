"""What training options cost: time of a step beside the default's in one run, and memory of a large one as counted.

Times: whole steps (views apart) of one model on random images, medians over interleaved repetitions, on this machine.
Memory: the estimate that `task=train` announces, for the paper's views and batch in bfloat16: counted, not run.
"""

import argparse
import dataclasses
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import numpy as np
import torch

from neco import config
from neco.augment.views import Views, view_rng
from neco.results import columns
from neco.training import memory
from neco.training.module import PostTraining

OPTIONS: dict[str, list[str]] = {
    "default": [],
    "train.blocks=4": ["train.blocks=4"],
    "train.blocks=0": ["train.blocks=0"],
    "train.lora_rank=8": ["train.lora_rank=8"],
    "train.checkpoint_activations=true": ["train.checkpoint_activations=true"],
    "train.teacher=none": ["train.teacher=none"],
    "augment.teacher=clean": ["augment.teacher=clean"],
    "augment.local_views=0": ["augment.local_views=0"],
    "augment.local_views=8": ["augment.local_views=8"],
    "loss.mask=fg": ["loss.mask=fg"],
    "loss.references=queue": ["loss.references=queue"],
    "loss.references=batch_other": ["loss.references=batch_other"],
    "loss.grid=14": ["loss.grid=14", "loss.reference_count=49"],
    "loss.reference_count=98": ["loss.reference_count=98"],
    "loss.network=odd_even": ["loss.network=odd_even"],
    "loss.relaxation=logistic": ["loss.relaxation=logistic"],
    "loss.similarity=euclidean": ["loss.similarity=euclidean"],
}


def build(overrides: list[str], batch: int) -> tuple[PostTraining, Views]:
    """The training module and its views as `task=train` makes them, with random weights."""
    settings = config.load("task=train", "weights=none", *overrides)
    options = dataclasses.replace(settings.spine["train"], batch_size=batch)
    torch.manual_seed(0)
    backbone = settings.build("model", drop_path=options.drop_path)
    views = settings.build("augment").resolve(backbone.patch, backbone.size)
    head, loss = settings.build("head", dim=backbone.dim), settings.build("loss")
    module = PostTraining(
        backbone, head, loss,
        options=options, optim=settings.spine["optim"], global_views=views.global_views, steps=1000, seed=0,
    )  # fmt: skip
    return module, views


def images(views: Views, batch: int) -> dict[str, torch.Tensor]:
    """Random pixels in the views' shapes, boxes of images of 480 x 640."""
    crops = np.stack([views.sample(view_rng(0, 0, index), 480, 640).crops for index in range(batch)])
    sizes = {"global_views": views.global_views, "local_views": views.local_views}
    if views.teacher == "clean":
        sizes["teacher_views"] = views.global_views
    shapes = {"global_views": views.sizes[0], "local_views": views.sizes[-1], "teacher_views": views.sizes[0]}
    pixels = {
        name: torch.randint(0, 256, (batch, count, 3, *shapes[name]), dtype=torch.uint8)
        for name, count in sizes.items()
    }
    return {**pixels, "crops": torch.from_numpy(crops)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2r_vits14")
    parser.add_argument("--batch", type=int, default=2, help="images of a timed step")
    parser.add_argument("--size", type=int, default=224, help="pixels of a timed global view")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", type=int, nargs=2, default=(518, 64), help="global view and batch of the count")
    options = parser.parse_args()
    size, batch = options.large
    seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
    modules, counted = {}, {}
    for name, overrides in OPTIONS.items():
        chosen = [f"model={options.model}", *overrides]
        module, views = build([*chosen, f"augment.global_size={options.size}"], options.batch)
        module.train()
        modules[name] = module, images(views, options.batch)
        large, views = build([*chosen, f"augment.global_size={size}"], batch)
        before = memory.current(torch.device("cpu"))
        counted[name] = memory.estimate(large, views.sizes, batch, True, torch.device("cpu")) - before
    for repeat in range(options.repeats + 1):  # the first warms up
        for name, (module, pixels) in modules.items():
            start = time.perf_counter()
            module.training_step(pixels, repeat).backward()
            module.student.zero_grad()
            seconds[name] += [time.perf_counter() - start] if repeat else []
    times = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [["option", "seconds", "time / default", "activations and gradients, GB"]]
    rows += [
        [name, f"{t:.2f}", f"{t / times['default']:.2f}", f"{counted[name] / memory.GB:.1f}"]
        for name, t in times.items()
    ]
    print(f"{options.model}: timed {options.batch} images at {options.size}, counted {batch} at {size} in bfloat16\n")
    print(columns(rows))


if __name__ == "__main__":
    main()
