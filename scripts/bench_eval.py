"""What evaluations cost.

bank: a retrieval memory of `--entries` synthetic features in float16, mapped from a file: its size, resident memory
at the peak, seconds for `--queries` patches by exact search and by faiss's inverted file, and the share of neighbours
that one finds. The exact search is compared with sorting all similarities of a few queries.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as neco.__main__ does, before torch is imported

import torch
import torch.nn.functional as F

from neco.eval.neighbours import Neighbours, bank
from neco.progress import track
from neco.results import columns
from neco.training import memory

BLOCK = 1 << 16
K = 30


def features(start: int, stop: int, dim: int) -> torch.Tensor:
    """Rows of a synthetic memory, a function of their place: 4096 directions with noise, so that some are near."""
    generator = torch.Generator().manual_seed(start)
    centres = F.normalize(torch.randn(4096, dim, generator=torch.Generator().manual_seed(7)), dim=1)
    chosen = torch.randint(4096, (stop - start,), generator=generator)
    noise = torch.randn(stop - start, dim, generator=generator) / dim**0.5
    return F.normalize(centres[chosen] + noise, dim=1)


def bench_bank(entries: int, dim: int, queries: int, cells: int, probes: int, folder: Path) -> None:
    """Fill, search, compare."""
    device = torch.device("cpu")
    stored = bank(entries, dim, torch.float16, folder)
    for place in track(range(0, entries, BLOCK), "filling"):
        stored[place : place + BLOCK] = features(place, min(entries, place + BLOCK), dim)
    asked = features(1, queries + 1, dim)
    rows = [["search", "seconds to build", "seconds", "found", "resident GB at the peak"]]
    start = time.perf_counter()
    values, places = Neighbours(stored)(asked, K)
    seconds = time.perf_counter() - start
    peak = memory.peak(device) / memory.GB
    few, best = asked[:8], torch.empty(8, 0)
    for begin in range(0, entries, BLOCK):
        best = (
            torch.cat([best, few @ stored[begin : begin + BLOCK].float().T], 1)
            .sort(dim=1, descending=True)
            .values[:, :K]
        )
    assert torch.allclose(best, values[:8], atol=1e-5), "an exact search is exact"
    rows.append(["exact", "", f"{seconds:.1f}", "100.0%", f"{peak:.1f}"])
    if cells:
        start = time.perf_counter()
        index = Neighbours(stored, cells=cells, probes=probes)
        built, start = time.perf_counter() - start, time.perf_counter()
        near = index(asked, K)[1]
        seconds = time.perf_counter() - start
        found = 100 * (near[:, :, None] == places[:, None]).any(2).float().mean()
        peak = memory.peak(device) / memory.GB
        rows.append(
            [f"{cells} cells, {probes} probed", f"{built:.1f}", f"{seconds:.1f}", f"{found:.1f}%", f"{peak:.1f}"]
        )
    size = entries * dim * 2 / memory.GB
    print(f"{entries} entries of {dim} dimensions, float16: {size:.1f} GB; {queries} queries, k={K}\n")
    print(columns(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bank"])
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--cells", type=int, default=4096, help="0: exact search alone")
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    bench_bank(options.entries, options.dim, options.queries, options.cells, options.probes, options.folder)


if __name__ == "__main__":
    main()
