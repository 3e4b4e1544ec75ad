"""Nearest neighbours by inner product, with faiss or plain torch, in memories that need not fit into RAM.

Shapes: M memory entries, Q queries, D channels, k neighbours.
"""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neco.distributed import collectives
from neco.distributed.devices import full_precision
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)

Engine = Literal["faiss", "torch"]
SIMILARITIES, ENTRIES = 2**26, 2**16  # the torch engine holds so many at a time, of so many entries
GPU_SIMILARITIES, GPU_ENTRIES = 2**29, 2**20  # 2 GB
TILE = 256  # rows of a product that a GPU makes together
GROUP = 32  # entries of which only the largest similarity is sorted at first
LEAST, SAMPLE = 39, 64  # entries a cell: in all (faiss's own limit), and from which the cells are found


def check_engine(engine: Engine) -> None:
    """Raises NecoError when `engine` is faiss and that is not installed; imports nothing."""
    if engine == "faiss" and find_spec("faiss") is None:
        raise NecoError(
            "engine=faiss: faiss is not installed. Install it (pip install faiss-cpu, or faiss-gpu for CUDA on Linux) "
            "or choose engine=torch, which gives the same answers"
        )


def load_faiss() -> ModuleType:
    """The faiss module, imported only where it is used: it takes a while, and need not be there."""
    check_engine("faiss")
    import faiss

    return faiss


def bank(rows: int, dim: int, dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """Room for a memory (M, D): in RAM, or in a nameless file in `folder` that is gone when nothing uses it any more.

    Raises NecoError when there is no room for the file.
    """
    if folder is None:
        return torch.empty(rows, dim, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    size = rows * dim * dtype.itemsize
    if size > (free := shutil.disk_usage(folder).free):
        raise NecoError(f"a memory of {size / 1e9:.1f} GB is wanted in {folder}, where {free / 1e9:.1f} GB are free")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        mapped = np.memmap(file, np.dtype(str(dtype).removeprefix("torch.")), "r+", shape=(rows, dim))
    return torch.from_numpy(mapped)


def _check_k(k: int, entries: int) -> None:
    if k > entries:
        raise NecoError(f"k={k} nearest of {entries} memory entries: use a smaller k or more images")


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k)` of (Q, M), sorting few of them: the k largest are in the k groups whose largest are largest."""
    groups = x.shape[1] // GROUP
    if groups < 4 * k:
        values, places = x.topk(k)
        return values, places
    body, rest = x.split([groups * GROUP, x.shape[1] - groups * GROUP], 1)
    body = body.unflatten(1, (GROUP, groups))  # neighbours are in different groups: read side by side
    chosen = body.amax(1).topk(k, sorted=False).indices[:, None]
    places = (chosen + groups * torch.arange(GROUP, device=x.device)[:, None]).flatten(1)
    places = torch.cat([places, torch.arange(groups * GROUP, x.shape[1], device=x.device).expand(len(x), -1)], 1)
    values, order = torch.cat([body.gather(2, chosen.expand(-1, GROUP, -1)).flatten(1), rest], 1).topk(k)
    return values, places.gather(1, order)


def halves(x: Tensor, scale: Tensor, order: Sequence[int]) -> Tensor:
    """x (M, D) times scale (M or 1, 1) as float16 (M, 3D) whose products, summed in float32, are those of float32.

    A float32 is the sum of two float16, a high and a low one, but for the last two of its 24 bits. Of the four products
    of two sums the least is left out, and the others are one of three times the length: tensor cores make
    that in a fraction of the time of float32's own. `order` of high (0) and low (1) is (0, 1, 0) for one factor and
    (1, 0, 0) for the other: small products come first, as tensor cores cut what they add to a larger sum.
    """
    parts = torch.empty(len(x), 3 * x.shape[1], dtype=torch.float16, device=x.device)
    for rows, factor, out in zip(*(t.split(ENTRIES) for t in (x, scale.expand(len(x), 1), parts)), strict=True):
        high = (scaled := rows.float() * factor).half()
        both = high, (scaled - high.float()).half()
        torch.cat([both[i] for i in order], 1, out=out)
    return parts


def _scale(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """For `halves`: powers of two that bring the largest to 2^8, far from float16's largest, low parts from its least.

    One for all (dim = (0, 1)) or for each row (dim = 1).
    """
    largest = torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True)).float()
    return torch.exp2(8 - largest.clamp(min=1e-30).log2().ceil())


def _splits(memory: Tensor) -> bool:
    """Whether products of its `halves` are to be had where it is, and there is room for them."""
    if not memory.numel() or memory.device.type != "cuda" or "dtype" not in torch.ops.aten.mm.overloads():  # torch 2.7
        return False
    kept = torch.cuda.memory_reserved(memory.device) - torch.cuda.memory_allocated(memory.device)  # by torch, unused
    free = torch.cuda.mem_get_info(memory.device)[0] + kept
    if room := 3 * memory.numel() * torch.float16.itemsize < free // 2:
        return room
    log.info("a memory of %d entries leaves no room for its halves: products in float32 take longer", len(memory))
    return False


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of float16, in float32."""
    return torch.mm(a, b.T, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float().T


class Neighbours:
    """The `k` entries of a memory with the largest inner product with each query.

    A flat search is exact for the memory as it is stored, with either engine; products are made in float32. Only faiss
    on a GPU rounds the queries, too, to float16 where the memory is that.

    Args:
        memory: (M, D) float32 or float16, also memory-mapped (see `bank`); kept, not copied, by the CPU engines.
        engine: `faiss`, on `device` where that is a GPU and faiss was built for them; or `torch`.
        device: where the torch engine works.
        cells: 0 = flat. Else faiss's inverted file of so many cells, of which `probes` are searched: faster, and not
            all neighbours are found.

    Raises:
        NecoError: cells with the torch engine, or more of them than entries.
    """

    def __init__(
        self,
        memory: Tensor,
        *,
        engine: Engine = "faiss",
        device: str | torch.device = "cpu",
        cells: int = 0,
        probes: int = 64,
    ) -> None:
        check_engine(engine)
        if cells and (engine == "torch" or cells > len(memory)):
            raise NecoError(f"cells={cells} need engine=faiss and as many memory entries ({len(memory)} here)")
        self.engine = engine
        self.device = torch.device(device if engine == "torch" else "cpu")
        self.memory = memory.contiguous().to(self.device)
        self.scale = None  # of a memory in `halves`
        if engine == "torch" and _splits(self.memory):
            self.scale = _scale(self.memory, (0, 1))
            self.memory = halves(self.memory, self.scale, (1, 0, 0))
        self.index = None
        place = torch.device(device)
        gpu = engine == "faiss" and place.type == "cuda" and load_faiss().get_num_gpus() > 0
        if cells or gpu:
            self.index = self._built(cells, probes, place if gpu else None)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries float32 (Q, D) -> similarities (Q, k), largest first, and int64 indices (Q, k), on `self.device`.

        Where the cells searched hold fewer than `k` entries the rest has the lowest similarity there is and index -1.

        Raises:
            NecoError: the memory has fewer than `k` entries.
        """
        _check_k(k, len(self.memory))
        if self.index is not None:
            values, places = self.index.search(queries.float().cpu().contiguous().numpy(), k)
            return torch.from_numpy(values), torch.from_numpy(places).long()
        size = len(queries)
        if self.engine == "torch":
            most = GPU_SIMILARITIES if self.device.type == "cuda" else SIMILARITIES
            size = most // min(self._entries(), len(self.memory))
            size -= size % TILE if size > TILE else 0
        with full_precision():
            parts = [self._search(part, k) for part in queries.float().to(self.device).split(max(1, size))]
        return torch.cat([s for s, _ in parts]), torch.cat([i for _, i in parts])

    def together(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same in the memories of all processes joined, in their order; each asks for queries of its own.

        All processes call this equally often, also those that have no more queries. An answer takes as many
        similarities from every process as there are of it, at most k.

        Raises:
            NecoError: they have fewer than `k` entries altogether.
        """
        if collectives.world() == 1:
            return self(queries, k)
        sizes, asked = collectives.merge((len(self.memory), len(queries))), collectives.gather_uneven(queries.float())
        _check_k(k, sum(entries for entries, _ in sizes))
        before = [sum(size[i] for size in sizes[: collectives.rank()]) for i in range(2)]
        values = torch.full((len(asked), k), -torch.inf, device=self.device)
        places = torch.full((len(asked), k), -1, device=self.device)
        if few := min(k, len(self.memory)) if len(asked) else 0:
            values[:, :few], places[:, :few] = self(asked, few)
            places[places >= 0] += before[0]
        own = slice(before[1], before[1] + len(queries))
        values, places = (
            collectives.gather_uneven(part).view(-1, len(asked), k)[:, own].transpose(0, 1).flatten(1)
            for part in (values, places)
        )
        values, order = values.topk(k)
        return values, places.gather(1, order)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values = queries.new_empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.long, device=self.device)
        entries = self._entries()
        for start in range(0, len(self.memory), entries):
            best, at = self._nearest(queries, self.memory[start : start + entries], k)
            values, places = torch.cat([values, best], 1), torch.cat([places, at + start], 1)
            values, order = values.topk(min(k, values.shape[1]))
            places = places.gather(1, order)
        return values, places

    def _nearest(self, queries: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        k = min(k, len(block))
        if self.scale is not None:
            scale = _scale(queries, 1)
            values, places = largest(_product(halves(queries, scale, (0, 1, 0)), block), k)
            return values / (scale * self.scale), places
        if self.engine == "torch":
            return largest(queries @ block.float().T, k)
        faiss = load_faiss()
        values, places = faiss.knn(queries.numpy(), block.float().numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(values), torch.from_numpy(places).long()

    def _entries(self) -> int:
        """Of a block of the memory."""
        if self.engine == "faiss" and self.memory.dtype == torch.float32:  # which has blocks of its own
            return len(self.memory)
        return GPU_ENTRIES if self.device.type == "cuda" else ENTRIES

    def _built(self, cells: int, probes: int, gpu: torch.device | None) -> Any:
        """A faiss index of the memory, which stores float16 as that."""
        faiss, half, (rows, dim) = load_faiss(), self.memory.dtype == torch.float16, self.memory.shape
        kind = (f"IVF{cells}," if cells else "") + ("SQfp16" if half else "Flat")
        index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        if cells:
            sample = torch.linspace(0, rows - 1, min(rows, SAMPLE * cells), dtype=torch.float64).long()
            index.train(self.memory[sample].float().numpy())
            index.nprobe = min(probes, cells)
        if gpu:
            torch.cuda.empty_cache()  # faiss could not use what torch keeps
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = half
            number = torch.cuda.current_device() if gpu.index is None else gpu.index
            index = faiss.index_cpu_to_gpus_list(index, co=options, gpus=[number])
        # A flat index of a GPU is copied whenever it grows: it gets all at once, or what float32 there is room for.
        size = ENTRIES if cells else GPU_ENTRIES if half else rows
        for start in range(0, rows, size):
            index.add(self.memory[start : start + size].float().numpy())
        return index
