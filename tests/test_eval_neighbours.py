"""Exact search: both engines against sorting all similarities."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neco.distributed import devices
from neco.eval.common import neighbors
from neco.eval.common.neighbors import Engine, Neighbours
from neco.utils.errors import NecoError

ENGINES: list[Engine] = ["faiss", "torch"]


def vectors(rows: int, seed: int, dim: int = 16) -> torch.Tensor:
    return F.normalize(torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, dim))).float(), dim=1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("queries", [1, 300])
def test_equals_sorting(engine: Engine, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "SIMILARITIES", 6400)  # several blocks, the last ones partial
    monkeypatch.setattr(neighbors, "ENTRIES", 100)
    memory, wanted = vectors(450, 0), vectors(queries, 1)
    values, places = Neighbours(memory, engine=engine)(wanted, 30)
    everything = (wanted.double() @ memory.double().T).sort(1, descending=True)
    assert torch.equal(places, everything.indices[:, :30])
    torch.testing.assert_close(values.double(), everything.values[:, :30], atol=1e-6, rtol=0)


@pytest.mark.parametrize("entries", [1000, 3850, 3851])
def test_the_largest_are_found_in_groups(entries: int) -> None:
    x = torch.randn(50, entries, generator=torch.Generator().manual_seed(entries))
    x[:, -3:] += 5  # outside of all groups
    values, places = neighbors.largest(x, 30)
    assert torch.equal(values, x.topk(30).values) and torch.equal(places, x.topk(30).indices)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_halves_products_are_float32s(scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, queries = (vectors(5000, 0, 384) * scale).to(dtype), vectors(20, 1, 384) * scale
    plain = Neighbours(memory, engine="torch")(queries, 30)
    monkeypatch.setattr(neighbors, "_splits", lambda memory: True)
    found = Neighbours(memory, engine="torch")
    values, places = found(queries, 30)
    exact = queries.double() @ memory.double().T
    assert found.memory.dtype == torch.float16 and (places == plain[1]).float().mean() > 0.995, "but for ties"
    assert (values - exact.gather(1, places)).abs().max() < 4e-7 * scale * float(memory.norm(dim=1).max())


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_from_a_file_is_exact_for_what_is_stored(engine: Engine, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(neighbors, "ENTRIES", 100)
    memory = neighbors.bank(450, 16, torch.float16, tmp_path / "bank")
    memory[:] = vectors(450, 0)
    assert not [*(tmp_path / "bank").iterdir()], "nothing is left behind, whatever happens"
    queries = vectors(70, 1)
    values, places = Neighbours(memory, engine=engine)(queries, 30)
    everything = (queries.double() @ memory.double().T).sort(dim=1, descending=True)
    torch.testing.assert_close(values.double(), everything.values[:, :30], atol=1e-6, rtol=0)
    assert (places == everything.indices[:, :30]).float().mean() > 0.999, "but for ties"


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_cells_find_most_and_with_all_probed_everything(dtype: torch.dtype) -> None:
    memory, queries = vectors(2000, 0).to(dtype), vectors(50, 1)
    exact = Neighbours(memory)(queries, 10)[1]
    share = {}
    for probes in (1, 4, 16):
        values, places = Neighbours(memory, cells=16, probes=probes)(queries, 10)
        assert ((places >= 0) == (values > -2)).all()
        share[probes] = (places[:, :, None] == exact[:, None]).any(2).float().mean()
    assert 0.1 < share[1] < share[4] < share[16] and share[16] > 0.99


def test_a_bank_without_room_is_refused(tmp_path) -> None:
    with pytest.raises(NecoError, match=r"a memory of 1024000\.0 GB is wanted in"):
        neighbors.bank(10**12, 512, torch.float16, tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_all_entries_can_be_asked_for_but_no_more(engine: Engine) -> None:
    index = Neighbours(vectors(12, 0), engine=engine)
    assert index(vectors(3, 1), 12)[1].sort(1).values.tolist() == [list(range(12))] * 3
    with pytest.raises(NecoError, match="k=13 nearest of 12"):
        index(vectors(3, 1), 13)


def test_without_faiss_both_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(neighbors, "find_spec", lambda name: None)
    with pytest.raises(NecoError, match=r"pip install faiss-cpu.*engine=torch"):
        Neighbours(vectors(3, 0))
    assert len(Neighbours(vectors(3, 0), engine="torch")(vectors(2, 1), 1)[0]) == 2


def test_full_precision_is_undone() -> None:
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        with devices.full_precision():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32 == convolutions
    finally:
        torch.set_float32_matmul_precision(before)
