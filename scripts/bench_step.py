"""A whole training step, views included, beside the published procedure written out plainly.

Ours: `Views` (uint8), `PostTraining`, AdamW, moving average, as `task=train` runs them. Published, in words of our own:
PIL views one after the other, a teacher whose graph is built and walked back through the reference patches, ROI align
pair by pair, dense relaxed sorting by PyPI `diffsort`, a loop over parameters for the average. Both start from the same
weights; on the same pixels, boxes and references their losses agree to 1e-5, which is asserted. Repetitions take turns.

    python scripts/bench_step.py --batch 4 --threads 2

On a GPU views are drawn once and stay there: timed are the steps, both networks in bfloat16, ours compiled.

    python scripts/bench_step.py --size 518 --batch 64
"""

import argparse
import copy
import io
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from diffsort import DiffSortNet
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.functional import normalize, to_tensor

from neco.augment import reference
from neco.augment.views import ViewParams, Views, view_rng
from neco.config import validate
from neco.config.types import MEAN, STD
from neco.distributed import collectives
from neco.model.linear import Linear
from neco.training.align import pair_boxes, pair_order
from neco.training.compiled import compile_step
from neco.training.data import collate
from neco.training.module import PostTraining, follow
from neco.training.references import permutations
from neco.utils.text_table import columns

GRID, STEEPNESS = 7, 100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {  # of operations on the CPU and of kernels on a GPU, by their names in the profiler
    "matrix products": r"linear_pointwise|aten::(mm|addmm|bmm|baddbmm|matmul|linear)$|_LinearBackw|gemm|nvjet|cutlass",
    "attention": r"scaled_dot_product|flash|fmha|sdpa",
    "sorting": r"_Sort|^_kernel",
    "activations, norms, colours": r"gelu|layer_norm|GeLU|LayerNorm|triton",
    "optimiser, moving average": r"Optimizer|lerp|sqrt|addcdiv|addcmul|multi_tensor|Adam",
    "patch embedding": r"convolution|conv|wgrad|dgrad|fprop",
}


def photograph(number: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG of about the size and detail of a photograph of COCO."""
    rng = np.random.default_rng(number)
    layers = [rng.integers(0, 256, (height // s + 1, width // s + 1, 3), dtype=np.uint8) for s in (4, 16, 64)]
    enlarged = [
        np.asarray(Image.fromarray(layer).resize((width, height), Image.Resampling.BICUBIC)) for layer in layers
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean(enlarged, 0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def build(model: str, size: int, arch: str) -> tuple[PostTraining, Views]:
    """What `task=train` builds, without stochastic depth, which would be drawn differently."""
    chosen = [f"augment.global_size={size}", "augment.local_size=null", "train.drop_path=0", "weights=none"]
    settings = validate.load("task=train", f"model={model}", *chosen, *([f"+model.arch={arch}"] if arch else []))
    torch.manual_seed(0)
    backbone = settings.build("model")
    views = settings.build("augment").resolve(backbone.patch, backbone.size)
    module = PostTraining(
        backbone, settings.build("head", dim=backbone.dim), settings.build("loss"),
        options=settings.spine["train"], optim=settings.spine["optim"], global_views=2, steps=1000, seed=0,
    )  # fmt: skip
    return module.train(), views


def half() -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")


def now() -> float:
    """The time, once the device has done what it was asked to."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Published:
    """The published step on the same networks."""

    def __init__(self, module: PostTraining, views: Views, fast_linear: bool) -> None:
        self.student, self.views, self.patch = copy.deepcopy(module.student), views, module.student.backbone.patch
        for layer in self.student.modules():
            if isinstance(layer, Linear) and not fast_linear:
                setattr(layer, "__class__", torch.nn.Linear)  # noqa: B010 (mypy)
        self.teacher = copy.deepcopy(self.student).eval()
        self.sorter = DiffSortNet("bitonic", GRID**2, DEVICE.type, steepness=STEEPNESS, interpolation_type="cauchy")
        self.optimizer = torch.optim.AdamW(self.student.parameters(), 1e-6)

    def pixels(self, file: bytes, params: ViewParams) -> list[Tensor]:
        """The views of an image, float (3, h, w) each."""
        image, found = Image.open(io.BytesIO(file)).convert("RGB"), []
        for i, size in enumerate(self.views.sizes):
            how = params.jitter[i], params.order[i], params.factors[i], params.grey[i], params.sigma[i]
            found.append(normalize(to_tensor(reference.view(image, size, params.crops[i], *how)), MEAN, STD))
        return found

    def loss(self, images: list[Tensor], crops: Tensor, step: int) -> Tensor:
        """`images`: of each view (B, 3, h, w)."""
        count, size = len(images), len(images[0])
        on_global, on_view = pair_boxes(crops, self.views.sizes, 2)
        with half():
            maps = [self.student(torch.cat(group)).split(size) for group in (images[:2], images[2:])]
            teacher = self.teacher(torch.cat(images[:2])).split(size)
        student = list(itertools.chain(*maps))
        dealt, losses = permutations(0, step, len(pair_order(2, count)), size * GRID**2, DEVICE), []
        for number, (g, v) in enumerate(pair_order(2, count)):
            theirs, ours = (
                roi_align(m.permute(0, 3, 1, 2), [*(b[:, None] / self.patch).unbind(0)], GRID, aligned=True)
                for m, b in ((teacher[g], on_global[:, g, v]), (student[v], on_view[:, v, g]))
            )
            theirs, ours = (F.normalize(x.flatten(2).mT, dim=-1) for x in (theirs, ours))  # (B, N, D)
            references = theirs.flatten(0, 1)[dealt[number]].view_as(theirs)
            with torch.no_grad():
                target = self.sorter(torch.einsum("bnd,brd->bnr", theirs, references).flatten(0, 1))[1]
            order = self.sorter(torch.einsum("bnd,brd->bnr", ours, references).flatten(0, 1))[1]
            losses.append(-(target * torch.log(order)).sum(-1).mean())
        return torch.stack(losses).mean()

    def step(self, images: list[Tensor], crops: Tensor, step: int) -> None:
        self.optimizer.zero_grad()
        self.loss(images, crops, step).backward()
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.data.mul_(0.9995).add_(theirs.data, alpha=0.0005)


def profile(step: Callable[[int], None], steps: int = 3) -> str:
    """Where the time of our step goes, by kinds of operations without what they call, or of kernels."""
    gpu, kinds = DEVICE.type == "cuda", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if gpu else kinds.CPU]) as seen:
        for number in range(steps):
            step(number)
        now()
    spent = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in seen.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "all else")
        spent[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6 / steps
    whole = sum(spent.values())
    return columns([["our step", "s", ""], *([k, f"{s:.3f}", f"{s / whole:.0%}"] for k, s in spent.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinov2r_vits14")
    parser.add_argument("--size", type=int, default=224, help="pixels of a global view (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fast-linear", action="store_true", help="the published step too multiplies by oneDNN")
    parser.add_argument("--profile", action="store_true", help="and where the time of our step goes")
    parser.add_argument("--small", action="store_true", help="a network of two narrow blocks, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arch = "{embed_dim:24,depth:2,num_heads:2}" if options.small else ""
    module, views = build(options.model, options.size, arch)
    module.to(DEVICE)
    published, optimizer = Published(module, views, options.fast_linear), module.configure_optimizers()
    if DEVICE.type == "cuda":
        compile_step(module, len(set(views.sizes)))
    files = [photograph(number) for number in range(options.batch)]

    def draw(step: int) -> list[ViewParams]:
        return [views.sample(view_rng(0, step, number), 480, 640) for number in range(options.batch)]

    def ours_views(step: int, how: Views = views) -> dict[str, Tensor]:
        items = []
        for file, params in zip(files, draw(step), strict=True):
            pixels = how.apply(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), params)
            items.append({"global_views": pixels[0], "local_views": pixels[1], "crops": torch.as_tensor(params.crops)})
        batch = collate([{**item, "bad": []} for item in items])
        return {name: value.to(DEVICE) for name, value in batch.items() if name != "bad"}

    def ours_step(batch: dict[str, Tensor], step: int) -> None:
        optimizer.zero_grad()
        with half():
            loss = module.training_step(batch, step)
        loss.backward()
        optimizer.step()
        follow(module.get_submodule("teacher"), module.student, 0.9995)

    def their_views(step: int) -> tuple[list[Tensor], Tensor]:
        drawn = draw(step)
        parts = [published.pixels(file, params) for file, params in zip(files, drawn, strict=True)]
        crops = torch.as_tensor(np.stack([params.crops for params in drawn]))
        return [torch.stack(view).to(DEVICE) for view in zip(*parts, strict=True)], crops.to(DEVICE)

    images, crops = their_views(0)
    pil = copy.copy(views)
    pil.applier = "pil"
    with torch.no_grad():
        theirs = float(published.loss(images, crops, 0))
        with half():
            losses = float(module.training_step(ours_views(0, pil), 0)), theirs
    assert abs(losses[0] - losses[1]) < (1e-5 if DEVICE.type == "cpu" else 1e-3) * abs(losses[1]), losses
    once, gpu = ours_views(0), DEVICE.type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in ("their views", "their step", "our views", "our step")}
    for step in range(options.repeats + 1):  # the first warms up
        marks = [now()]
        images, crops = (images, crops) if gpu else their_views(step)
        marks.append(now())
        published.step(images, crops, step)
        marks.append(now())
        batch = once if gpu else ours_views(step)
        marks.append(now())
        ours_step(batch, step)
        marks.append(now())
        for name, (start, end) in zip(seconds, itertools.pairwise(marks), strict=True):
            seconds[name] += [end - start] * bool(step)
    part = {name: statistics.median(found) for name, found in seconds.items()}
    whole = [
        [a + b for a, b in zip(seconds[f"{w} views"], seconds[f"{w} step"], strict=True)] for w in ("their", "our")
    ]
    ratios = [theirs / ours for theirs, ours in zip(*whole, strict=True)]
    print(
        f"{options.model}, {options.batch} images at {options.size}, {options.threads} threads; the same loss of the ",
        end="",
    )
    print(f"same pixels: {losses[0]:.6f}, published {losses[1]:.6f}\n")
    rows = [["", "published s", "ours s", "ratio"]]
    for name in ("step",) if gpu else ("views", "step"):
        theirs, ours = part[f"their {name}"], part[f"our {name}"]
        rows.append([name, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}"])
    theirs, ours = map(statistics.median, whole)
    rows += [] if gpu else [["both", f"{theirs:.2f}", f"{ours:.2f}", f"{statistics.median(ratios):.2f}"]]
    print(columns(rows))
    print(f"\nratios of {options.repeats} repetitions: {min(ratios):.2f} to {max(ratios):.2f}")
    if options.profile:
        print("\n" + profile(lambda step: ours_step(once if gpu else ours_views(step), step)))


if __name__ == "__main__":
    with collectives.fast_attention():
        main()
