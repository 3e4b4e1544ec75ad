"""What training on many GPUs takes: counted where it can be, simulated where it cannot. Nothing here is a measurement.

Counted, for each network, on the meta device: arithmetic of a training step (torch's FLOP counter, fused attention
included), parameters, bytes that processes exchange, bytes of a GPU's memory. Simulated, from these and from the rates
given below: seconds of a step on 8 to 512 GPUs, and what limits it.

    python scripts/scale.py --models dinov2r_vits14 dinov2r_vitb14 --images 100000000
"""

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import torch
from torch.utils.flop_counter import FlopCounterMode

from neco.config import validate
from neco.training.module import PostTraining
from neco.utils.text_table import columns

PAIRS, CELLS, DIM, PUSHED = 10, 49, 256, 10  # of 2 + 4 views; aligned patches; channels of the head; queue, an image
GB = 1e9
VIT_G = ["model=dinov2_vitl14", "model.name=vit_giant_patch14_reg4_dinov2.lvd142m"]


def count(model: str, size: int) -> dict[str, float]:
    """Arithmetic of an image's training step and parameters of the backbone, 2 + 4 views of `size` and 98 pixels."""
    chosen = VIT_G if model == "dinov2r_vitg14" else [f"model={model}"]
    settings = validate.load("task=train", *chosen, "weights=none", "train.drop_path=0", f"augment.global_size={size}")
    with torch.device("meta"):
        backbone = settings.build("model")
        views = settings.build("augment").resolve(backbone.patch, backbone.size)
        head, loss = settings.build("head", dim=backbone.dim), settings.build("loss")
        module = PostTraining(
            backbone, head, loss,
            options=settings.spine["train"], optim=settings.spine["optim"], global_views=2, steps=10, seed=0,
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            for student in (True, False):
                network = module.student if student else module.get_submodule("teacher")
                for number, (height, width) in ((2, views.sizes[0]), (4 * student, views.sizes[-1])):
                    if number:
                        with torch.set_grad_enabled(student):
                            maps = network(torch.empty(number, 3, height, width))
                        if student:
                            maps.sum().backward()
    trained = sum(p.numel() for p in module.student.parameters())
    return {"flop": counter.get_total_flops(), "trained": trained, "blocks": backbone.depth}


def simulate(found: dict[str, float], gpus: int, batch: int, queue: bool, options: argparse.Namespace) -> list[str]:
    """A line of the table: the step of `batch` images a GPU."""
    compute = batch * found["flop"] / (options.tflops * 1e12 * options.utilisation)
    sharded = (
        found["trained"] * 20 / GB > options.shard_from
    )  # parameters, gradients, AdamW's two, the teacher: 4 B each
    grads = (
        4 * found["trained"] * (3 if sharded else 2) * (gpus - 1) / gpus / GB
    )  # gathered twice and reduced, or reduced
    pushed = 2 * PUSHED * batch * gpus * DIM * 4
    pool = PAIRS * batch * gpus * CELLS * DIM * 4
    references = (pushed if queue else pool) / GB
    network = options.inside if gpus <= 8 else options.between
    exchanged, waited = grads / network, references / network
    shown = max(0.0, exchanged - 0.6 * compute) + waited  # gradients travel while the backward pass runs
    step = compute + shown
    state = found["trained"] * 20 / (gpus if sharded else 1) / GB
    rate = batch * gpus / step
    return [
        str(gpus), "fsdp" if sharded else "ddp", str(batch * gpus), f"{1000 * compute:.0f}", f"{1000 * exchanged:.0f}",
        f"{1000 * waited:.0f}", f"{1000 * step:.0f}", f"{100 * compute / step:.0f}%", f"{rate:.0f}",
        f"{options.images / rate / 3600:.1f}", f"{state:.1f}", f"{rate / gpus * 8 * options.cpu / 1000:.0f}",
        f"{rate / gpus * 8 * 0.15 / 1000:.2f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["dinov2r_vits14", "dinov2r_vitb14", "dinov2r_vitl14", "dinov2r_vitg14"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--size", type=int, default=518, help="pixels of a global view (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images of a GPU and step (default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 256, 512])
    parser.add_argument("--images", type=float, default=100e6, help="of an epoch (default: %(default)g)")
    parser.add_argument("--tflops", type=float, default=790, help="of a GPU in bf16 (default: %(default)g, H200)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="of them (default: %(default)g)")
    parser.add_argument("--inside", type=float, default=300, help="GB/s of a GPU within a node (default: %(default)g)")
    parser.add_argument("--between", type=float, default=40, help="GB/s of a GPU between nodes (default: %(default)g)")
    parser.add_argument("--cpu", type=float, default=10.7, help="ms to decode and crop an image (default: %(default)g)")
    parser.add_argument("--shard-from", type=float, default=20, help="GB of training state (default: %(default)g)")
    options = parser.parse_args()
    head = ["GPUs", "state", "batch", "compute ms", "gradients ms", "references ms", "step ms", "busy", "images/s"]
    head += ["hours an epoch", "state GB", "cores a node", "GB/s a node"]
    for model in options.models:
        found = count(model, options.size)
        print(
            f"\n{model}: {found['flop'] / 1e12:.2f} TFLOP an image, {found['trained'] / 1e6:.0f} M parameters trained"
        )
        for queue in (True, False):
            print(f"\nloss.references={'queue' if queue else 'batch'}")
            print(columns([head, *(simulate(found, gpus, options.batch, queue, options) for gpus in options.gpus)]))


if __name__ == "__main__":
    main()
