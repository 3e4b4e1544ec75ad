"""Exact nearest neighbours by inner product, with faiss or plain torch.

Shapes: M memory entries, Q queries, D channels, k neighbours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from neco.errors import NecoError

Engine = Literal["faiss", "torch"]
QUERIES, ENTRIES = 1024, 65536  # the torch engine holds QUERIES x ENTRIES similarities at a time


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


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 products on a GPU in float32, whatever the training around has chosen (TF32 keeps 10 bits)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Neighbours:
    """The `k` entries of a memory with the largest inner product with each query; both engines give the same.

    Args:
        memory: float32 (M, D); kept, not copied, by the CPU engines.
        engine: `faiss`, a flat index, on the GPUs when `device` is one and faiss was built for them; or `torch`.
        device: where the torch engine works.
    """

    def __init__(self, memory: Tensor, *, engine: Engine = "faiss", device: str | torch.device = "cpu") -> None:
        check_engine(engine)
        self.engine = engine
        self.device = torch.device(device if engine == "torch" else "cpu")
        self.memory = memory.float().contiguous().to(self.device)
        self.index = None
        if engine == "faiss" and torch.device(device).type == "cuda" and (faiss := load_faiss()).get_num_gpus():
            self.index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(memory.shape[1]))
            self.index.add(self.memory.numpy())

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries float32 (Q, D) -> similarities (Q, k), largest first, and int64 indices (Q, k), on `self.device`.

        Raises:
            NecoError: the memory has fewer than `k` entries.
        """
        if k > len(self.memory):
            raise NecoError(f"k={k} nearest of {len(self.memory)} memory entries: use a smaller k or more images")
        if self.engine == "torch":
            with full_precision():
                parts = [self._search(part, k) for part in queries.to(self.device).split(QUERIES)]
            return torch.cat([s for s, _ in parts]), torch.cat([i for _, i in parts])
        faiss, wanted = load_faiss(), queries.float().cpu().contiguous().numpy()
        if self.index is not None:
            found = self.index.search(wanted, k)
        else:
            found = faiss.knn(wanted, self.memory.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1]).long()

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values = queries.new_empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.long, device=self.device)
        for start in range(0, len(self.memory), ENTRIES):
            block = queries @ self.memory[start : start + ENTRIES].T
            best, at = block.topk(min(k, block.shape[1]))
            values, places = torch.cat([values, best], 1), torch.cat([places, at + start], 1)
            values, order = values.topk(min(k, values.shape[1]))
            places = places.gather(1, order)
        return values, places
