"""Make the warm start of `tiny`: masked autoencoding of the drawn scenes, on a CPU, in minutes to an hour.

Post-training orders what a backbone already knows, so the demo needs one that knows something. Masked patches are
predicted from the visible ones (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022); what is
predicted of a patch is not its pixels but the shape of its power spectrum (as MaskFeat, CVPR 2022, predicts gradient
histograms), which says what texture is there and nothing of its colour, contrast or phase.

Writes neco/model/tiny.safetensors: timm's names, float16, under 1 MB. Deterministic for a seed and a number of threads.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from neco import load_backbone
from neco.augment.colour import normalise
from neco.augment.views import random_crop
from neco.config import validate
from neco.dataset.base import read_image
from neco.utils.progress import track

OUT = Path(__file__).parents[1] / "neco" / "model" / "tiny.safetensors"
WIDTH = 64  # of the decoder
WINDOW = torch.hann_window(10, periodic=False)[1:-1].outer(torch.hann_window(10, periodic=False)[1:-1])


def patches(images: Tensor, patch: int) -> Tensor:
    """(B, 3, S, S) -> (B, N, 3, p, p), row by row."""
    return images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def spectrum(images: Tensor, patch: int) -> Tensor:
    """Log of each patch's power spectrum as a share of its power, colours added, (B, N, frequencies)."""
    cells = patches(images, patch)
    waves = torch.fft.rfft2((cells - cells.mean((-1, -2), keepdim=True)) * WINDOW)
    power = waves.abs().square().sum(2).flatten(2)[..., 1:]
    return (power / (power.sum(-1, keepdim=True) + 1e-3) + 1e-2).log()


def batch(images: Tensor, size: int, count: int, rng: np.random.Generator) -> Tensor:
    """`count` random resized crops of random images, normalised (B, 3, S, S)."""
    views = []
    for i in rng.integers(0, len(images), count):
        x1, y1, x2, y2 = random_crop(rng, images.shape[2], images.shape[3], (0.15, 1.0), (3 / 4, 4 / 3))
        crop = images[i : i + 1, :, y1:y2, x1:x2].float()
        views.append(F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True))
    return normalise(torch.cat(views).round().byte())


class Autoencoder(nn.Module):
    """The backbone sees the kept patches alone; a small decoder fills in the others."""

    def __init__(self, net: Any, out: int) -> None:
        super().__init__()
        self.net, tokens = net, net.pos_embed.shape[1]
        self.narrow = nn.Linear(net.embed_dim, WIDTH)
        self.mask = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, tokens, WIDTH) * 0.02)
        self.decoder = nn.Sequential(Block(WIDTH, 4, qkv_bias=True), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, out))

    def forward(self, images: Tensor, order: Tensor, keep: int) -> Tensor:
        """Prediction for all N patches; `order` (B, N) lists patches, the first `keep` are seen."""
        net: Any = self.net
        tokens = net.patch_embed(images).flatten(1, 2) + net.pos_embed[:, 1:]
        seen = tokens.gather(1, order[:, :keep, None].expand(-1, -1, tokens.shape[2]))
        cls = (net.cls_token + net.pos_embed[:, :1]).expand(len(images), -1, -1)
        encoded = self.narrow(net.norm(net.blocks(torch.cat([cls, seen], 1))))
        hidden = self.mask.expand(*order[:, keep:].shape, -1)
        back = order.argsort(1)[..., None].expand(-1, -1, WIDTH)
        full = torch.cat([encoded[:, 1:], hidden], 1).gather(1, back)
        return self.decoder(torch.cat([encoded[:, :1], full], 1) + self.positions)[:, 1:]


def whiten(net: Any, images: Tensor) -> None:
    """Start the patch embedding at the whitened principal components: fine texture has little of the variance."""
    patch = net.patch_embed.patch_size[0]
    cells = patches(images, patch).flatten(0, 1).flatten(1)
    mean = cells.mean(0)
    values, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    weight = 0.5 * (vectors * (values + 0.02).rsqrt()).flip(1)[:, : net.embed_dim].T
    with torch.no_grad():
        net.patch_embed.proj.weight.copy_(weight.reshape(net.patch_embed.proj.weight.shape))
        net.patch_embed.proj.bias.copy_(-weight @ mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, steps or not")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--keep", type=float, default=0.4, help="share of the patches that is seen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--further", action="store_true", help="go on from the packaged weights, not from random ones")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()

    settings = validate.load("task=train", "experiment=demo", "weights=none", "dataset.train=2000")
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    samples = settings.build("dataset").samples("train")
    images = torch.stack([torch.tensor(read_image(sample.image)).permute(2, 0, 1) for sample in samples])
    backbone = load_backbone("tiny", weights="auto" if options.further else "none")
    net, size, patch = backbone.net.requires_grad_(True).train(), backbone.size, backbone.patch
    if not options.further:
        whiten(net, batch(images, size, 1024, rng))
    sample = spectrum(batch(images, size, 256, rng), patch)
    mean, std = sample.mean((0, 1)), sample.std((0, 1))
    model = Autoencoder(net, len(mean))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    start, losses, done = time.monotonic(), [], 0.0
    for step in track(range(options.steps), "warm start"):
        done = max(step / options.steps, (time.monotonic() - start) / options.seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        views = batch(images, size, options.batch, rng)
        wanted = (spectrum(views, patch) - mean) / std
        order = torch.rand(wanted.shape[:2]).argsort(1)
        predicted = model(views, order, int(options.keep * wanted.shape[1]))
        loss = F.mse_loss(predicted, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % 500 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-500:]):.4f}, {time.monotonic() - start:.0f} s", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.half().contiguous() for k, v in net.state_dict().items()}, options.out)
    print(f"wrote {options.out}: {options.out.stat().st_size} bytes, loss {np.mean(losses[-500:]):.4f}")


if __name__ == "__main__":
    main()
