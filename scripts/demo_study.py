"""The demo, several seeds, beside its controls: does the gain come from ordering patches alike?

Arms, all from the same warm start and with the same evaluation:

  neco        the demo itself
  shuffled    the teacher's patches of another image: the same cost, nothing to agree on
  warm-start  the objective of the warm start (scripts/make_tiny.py) continued for as long as NeCo trained
  rgb, xy     no network: the pixels of a patch, its position

What counts as a gain, fixed before any tuning: the mean change of retrieval mIoU over the seeds, paired by seed, is
above two standard errors; two points are aimed at.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from neco.config import validate
from neco.utils.text_table import columns

ROOT = Path(__file__).parents[1]
DEMO = ("task=train", "experiment=demo")


class Pixels(torch.nn.Module):
    """Normalised images (B, 3, H, W) -> the pixels of each patch (B, h, w, 3 patch^2)."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.dim = patch, 3 * patch**2

    def forward(self, images: Tensor) -> Tensor:
        h, w = (side // self.patch for side in images.shape[2:])
        return torch.nn.functional.unfold(images, self.patch, stride=self.patch).mT.unflatten(1, (h, w))


class Positions(torch.nn.Module):
    """Normalised images (B, 3, H, W) -> sines and cosines of each patch's place (B, h, w, 8)."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.dim = patch, 8

    def forward(self, images: Tensor) -> Tensor:
        h, w = (side // self.patch for side in images.shape[2:])
        y, x = torch.meshgrid(torch.arange(h) / h, torch.arange(w) / w, indexing="ij")
        angles = torch.stack([place * factor for place in (y, x) for factor in (1.5, 3.0)], -1)
        return torch.cat([angles.sin(), angles.cos()], -1).expand(len(images), -1, -1, -1)


def numbers(records: list[dict], step: int, network: str) -> dict[str, float]:
    """`retrieval/miou_k30` and so on of one network at one step."""
    chosen = [r for r in records if r["step"] == step and r["network"] == network]
    return {f"{r['evaluation']}/{name}": value for r in chosen for name, value in r["metrics"].items()}


def train(arm: str, seed: int, out: Path, extra: list[str]) -> tuple[list[dict], float]:
    """Run the demo (or find it done); its records and the seconds it trained."""
    folder = out / f"{arm}-{seed}"
    loss = [f"loss={arm}"] if arm != "neco" else []
    command = [sys.executable, "-m", "neco", *DEMO, *loss, f"seed={seed}", f"run_dir={folder}", *extra]
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT)
    records = json.loads((folder / "results.json").read_text())
    seconds_file = folder / "seconds.txt"
    if not seconds_file.is_file():
        spent = sum({(r["step"], r["evaluation"], r["weights"]): r["seconds"] for r in records}.values())
        seconds_file.write_text(str(time.monotonic() - start - spent))
    return records, float(seconds_file.read_text())


def evaluate(backbone: torch.nn.Module, extra: list[str]) -> dict[str, float]:
    """The demo's evaluations on any backbone."""
    settings = validate.load(*DEMO, *extra)
    dataset, extract = settings.build("dataset"), settings.build("extract", device="cpu")
    found: dict[str, float] = {}
    for name, evaluation in settings.build_all("eval").items():
        result = evaluation(backbone, dataset, extract=extract, seed=settings.run.seed)
        found |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
    return found


def continued(seed: int, seconds: float, out: Path, extra: list[str]) -> dict[str, float]:
    """The warm start trained on with its own objective for `seconds`."""
    from neco import load_backbone

    file = out / f"warm-start-{seed}.safetensors"
    if not file.is_file():
        script = [sys.executable, ROOT / "scripts" / "make_tiny.py", "--further"]
        limits = ["--seconds", f"{seconds:.0f}", "--seed", str(seed), "--out", file]
        subprocess.run([*map(str, [*script, *limits])], check=True, cwd=ROOT)
    return evaluate(load_backbone(str(file), model="tiny"), extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo-study", help="resumed when it exists")
    parser.add_argument("overrides", nargs="*", help="of the demo, e.g. train.steps=50")
    options = parser.parse_args()
    out, extra = options.out.resolve(), options.overrides

    changes: dict[tuple[str, str], list[dict[str, float]]] = {}
    before: list[dict[str, float]] = []
    for seed in range(options.seeds):
        for arm in ("neco", "shuffled"):
            records, seconds = train(arm, seed, out, extra)
            last = max(r["step"] for r in records)
            for network in ("student", "teacher"):
                start = numbers(records, 0, network)
                after = numbers(records, last, network)
                changes.setdefault((arm, network), []).append({k: after[k] - start[k] for k in after})
            if arm == "neco":
                before.append(start)
                after = continued(seed, seconds, out, extra)
                changes.setdefault(("warm-start", "backbone"), []).append({k: after[k] - start[k] for k in after})

    metrics = list(before[0])
    rows = [["arm", "network", "seeds", *metrics]]
    mean = {metric: statistics.fmean(b[metric] for b in before) for metric in metrics}
    rows.append(["before", "", str(len(before)), *(f"{mean[m]:.4f}" for m in metrics)])
    for (arm, network), found in changes.items():
        cells = []
        for metric in metrics:
            values = [change[metric] for change in found]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{statistics.fmean(values):+.4f} +- {error:.4f}")
        rows.append([arm, network, str(len(found)), *cells])
    patch = 8
    for name, features in (("rgb", Pixels(patch)), ("xy", Positions(patch))):
        plain = evaluate(features, extra)
        rows.append([name, "", "", *(f"{plain[m]:.4f}" for m in metrics)])
    print("\nmIoU before; change (mean +- standard error, paired by seed) of each arm; mIoU without a network\n")
    print(columns(rows))


if __name__ == "__main__":
    main()
