"""Evaluation at its full size on one device: nearest neighbours, k-means, feature extraction.

retrieval  `--queries` patches against a memory of `--entries` by the torch engine; faiss's flat search on the CPU
           has to find the same neighbours of a sample of them
kmeans     `--rows` points of 50 channels into 500 clusters, all points, by the torch engine, and by faiss on the CPU
           with `--beside`: their objectives agree to 0.5%
extract    patch features of `--images` drawn photographs, decoding included, beside forward passes alone; at least
           2,000, so that what workers read while they start counts for little

    python scripts/bench_features.py retrieval kmeans extract          # sizes of Pascal VOC, for a GPU
    python scripts/bench_features.py retrieval --small                 # anywhere
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import torch
import torch.nn.functional as F
from bench_data import jpeg
from torch import Tensor

from neco.config import validate
from neco.distributed.devices import full_precision
from neco.eval.common.clustering import kmeans
from neco.eval.common.neighbors import Neighbours
from neco.features.extractor import Extract
from neco.utils.text_table import columns

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
K = 30
SMALL = {
    "entries": 4096, "queries": 2048, "rows": 4000, "clusters": 20, "images": 8, "batch": 2, "repeats": 1, "size": 112,
}  # fmt: skip


def timed(call: Callable[[], Any], repeats: int, first: Callable[[], Any] | None = None) -> tuple[float, Any]:
    """Median seconds of so many calls after a `first` one, and what the last gave."""
    seconds = []
    (first or call)()
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        result = call()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def wait() -> None:
    """For what a GPU was given to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def clustered(rows: int, dim: int, seed: int) -> Tensor:
    """Rows around 2000 centres."""
    draw = torch.Generator(DEVICE).manual_seed(7)
    centres = torch.randn(2000, dim, generator=draw, device=DEVICE)
    draw.manual_seed(seed)
    of = torch.randint(2000, (rows,), generator=draw, device=DEVICE)
    return torch.randn(rows, dim, generator=draw, device=DEVICE).add_(centres[of])


def retrieval(options: argparse.Namespace) -> list[str]:
    memory, queries = (
        F.normalize(clustered(n, 384, s), dim=1) for s, n in enumerate((options.entries, options.queries))
    )
    search = Neighbours(memory, engine="torch", device=DEVICE)
    seconds, (values, _) = timed(lambda: search(queries, K), options.repeats, lambda: search(queries[:4096], K))
    sample = torch.linspace(0, len(queries) - 1, min(1024, len(queries))).long()
    exact, _ = Neighbours(memory.cpu(), engine="faiss")(queries.cpu()[sample], K)
    worst = float((values[sample].cpu() - exact).abs().max())
    if worst > 1e-5:  # of equal places the order may differ, of similarities not
        raise SystemExit(f"retrieval: similarities differ from faiss's by {worst:g}")
    return [
        f"retrieval: {len(queries)} queries, {len(memory)} entries of 384, k={K}",
        f"{seconds:.2f} s",
        "as faiss flat",
    ]


def clustering(options: argparse.Namespace) -> list[str]:
    points, k = clustered(options.rows, 50, 0).cpu().numpy(), options.clusters
    how: dict[str, Any] = dict(iterations=50, restarts=5, sample=-(-len(points) // k))
    seconds, ours = timed(lambda: kmeans(points, k, engine="torch", device=DEVICE, **how), options.repeats)
    said = f"objective {ours.objective:.4g}"
    if options.beside:
        start = time.perf_counter()
        theirs = kmeans(points, k, engine="faiss", **how)
        said += f"; faiss on the CPU {theirs.objective:.4g} in {time.perf_counter() - start:.1f} s"
        if abs(ours.objective / theirs.objective - 1) > 5e-3:
            raise SystemExit(f"kmeans: {said}")
    return [f"k-means: {len(points)} points of 50, k={k}, 5 restarts of 50 iterations", f"{seconds:.2f} s", said]


def extract(options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.images):
            Path(folder, f"{number:06}.jpg").write_bytes(jpeg(number))
        chosen = f"dataset=folder dataset.root={folder} model={options.model} weights=none".split()
        settings = validate.load("task=embed", *chosen)
        dataset, backbone = settings.build("dataset"), settings.build("model").to(DEVICE).eval()
        samples = dataset.samples("train")
        reader = Extract(batch_size=options.batch, workers=options.workers)

        def read() -> float:
            """Images a second, from the first batch on: the workers' start is left out."""
            parts = reader.stream(backbone, dataset, samples, options.size, nearest=None)
            next(parts)
            start = time.perf_counter()
            return sum(len(maps) for _, maps, _ in parts) / (time.perf_counter() - start)

        rate = statistics.median(read() for _ in range(options.repeats))
    pixels = torch.randn(options.batch, 3, options.size, options.size, device=DEVICE)
    with torch.no_grad(), full_precision():
        alone, _ = timed(lambda: backbone(pixels), 5 * options.repeats)
    forward = options.batch / alone
    what = f"extraction: {options.model} at {options.size}, {options.workers} workers"
    return [what, f"{rate:.1f} images/s", f"forward alone {forward:.1f} images/s: {rate / forward:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["retrieval", "kmeans", "extract"])
    for name, value, about in (
        ("entries", 1_024_000, "of the memory"), ("queries", 1449 * 1369, "patches of VOC's val at 518"),
        ("rows", 1_500_000, "of k-means"), ("clusters", 500, "of k-means"), ("images", 2000, "to extract"),
        ("batch", 32, "of extraction"), ("size", 518, "pixels of an image"), ("workers", os.cpu_count() or 2, ""),
        ("repeats", 3, ""),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{about} (default: %(default)s)")
    parser.add_argument("--model", default="dinov2_vits14")
    parser.add_argument("--beside", action="store_true", help="k-means by faiss too, which takes minutes at full size")
    parser.add_argument("--small", action="store_true", help="sizes to try the script")
    options = parser.parse_args()
    if options.small:
        parser.set_defaults(**SMALL)
        options = parser.parse_args()
    if options.images <= options.batch:
        parser.error(f"--images {options.images}: more than a batch ({options.batch}) are wanted")
    rows = [["what", "measured", "beside it"]]
    rows += [{"retrieval": retrieval, "kmeans": clustering, "extract": extract}[what](options) for what in options.what]
    print(f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'}, median of {options.repeats}\n")
    print(columns(rows))


if __name__ == "__main__":
    main()
