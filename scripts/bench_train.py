"""What training options cost: time of a step beside the default's in one run, and memory of a large one as counted.

Times: whole steps (views apart) of one model on random images, medians over interleaved repetitions, on this machine's
GPU in bfloat16 if it has one. `augment.colour=device` adds the colours to the step, which workers are then spared.
Memory: the estimate that `task=train` announces, for the paper's views and batch in bfloat16: counted, not run.
"""

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

from neco.distributed import device_memory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch.utils.data import default_collate

from neco.augment import batched
from neco.augment.views import Views, view_rng
from neco.config import validate
from neco.distributed import collectives
from neco.training import compiled, memory
from neco.training.module import PostTraining
from neco.utils.text_table import columns

OPTIONS: dict[str, list[str]] = {
    "default": [],
    "train.blocks=4": ["train.blocks=4"],
    "train.blocks=0": ["train.blocks=0"],
    "train.lora_rank=8": ["train.lora_rank=8"],
    "train.checkpoint_activations=true": ["train.checkpoint_activations=true"],
    "train.teacher=none": ["train.teacher=none"],
    "augment.teacher=clean": ["augment.teacher=clean"],
    "augment.colour=device": ["augment.colour=device"],
    "train.compile=true": ["train.compile=true"],
    "both": ["augment.colour=device", "train.compile=true"],
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
    settings = validate.load("task=train", "weights=none", "augment.colour=worker", *overrides)
    options = dataclasses.replace(settings.spine["train"], batch_size=batch)
    torch.manual_seed(0)
    backbone = settings.build("model", drop_path=options.drop_path)
    views = settings.build("augment").resolve(backbone.patch, backbone.size)
    head, loss = settings.build("head", dim=backbone.dim), settings.build("loss")
    module = PostTraining(
        backbone, head, loss,
        options=options, optim=settings.spine["optim"], global_views=views.global_views, steps=1000, seed=0,
        clean=views.teacher == "clean",
    )  # fmt: skip
    if options.compile is True:
        compiled.compile_step(module, len(set(views.sizes)))
    return module, views


def images(views: Views, batch: int) -> dict[str, Any]:
    """Random pixels in the views' shapes, boxes and, unless workers apply them, colours of images of 480 x 640."""
    drawn = [views.sample(view_rng(0, 0, index), 480, 640) for index in range(batch)]
    rest: dict[str, Any] = {"crops": torch.from_numpy(np.stack([params.crops for params in drawn]))}
    if plain := views.batched(torch.device("cpu")):
        rest["colours"] = default_collate([batched.parameters(params, views.largest_sigma) for params in drawn])
    sizes = {"global_views": views.global_views, "local_views": views.local_views}
    if views.teacher == "clean" and not plain:
        sizes["teacher_views"] = views.global_views
    shapes = {"global_views": views.sizes[0], "local_views": views.sizes[-1], "teacher_views": views.sizes[0]}
    pixels = {
        name: torch.randint(0, 256, (batch, count, 3, *shapes[name]), dtype=torch.uint8)
        for name, count in sizes.items()
    }
    return {**pixels, **rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2r_vits14")
    parser.add_argument("--batch", type=int, default=2, help="images of a timed step")
    parser.add_argument("--size", type=int, default=224, help="pixels of a timed global view")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=OPTIONS, default=list(OPTIONS), help="beside the default")
    parser.add_argument("--large", type=int, nargs=2, default=(518, 64), help="global view and batch of the count")
    options = parser.parse_args()
    size, batch = options.large
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = {name: OPTIONS[name] for name in dict.fromkeys(["default", *options.only])}
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    modules, counted = {}, {}
    for name, overrides in asked.items():
        chosen = [f"model={options.model}", *overrides]
        module, views = build([*chosen, f"augment.global_size={options.size}"], options.batch)
        module.to(device).train()
        modules[name] = module, move_data_to_device(images(views, options.batch), device)
        large, views = build([*chosen, f"augment.global_size={size}"], batch)
        before = device_memory.current(torch.device("cpu"))
        counted[name] = memory.estimate(large, views.sizes, batch, True, torch.device("cpu")) - before
    for repeat in range(options.repeats + 1):  # the first warms up
        for name, (module, pixels) in modules.items():
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = module.training_step(pixels, repeat)
            loss.backward()
            module.student.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - start] if repeat else []
    times = {name: statistics.median(found) for name, found in seconds.items()}
    rows = [["option", "seconds", "time / default", "activations and gradients, GB"]]
    rows += [
        [name, f"{t:.2f}", f"{t / times['default']:.2f}", f"{counted[name] / device_memory.GB:.1f}"]
        for name, t in times.items()
    ]
    print(f"{options.model}: timed {options.batch} images at {options.size}, counted {batch} at {size} in bfloat16\n")
    print(columns(rows))


if __name__ == "__main__":
    with collectives.fast_attention():
        main()
