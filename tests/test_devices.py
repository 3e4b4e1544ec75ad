"""Several processes give what one gives: two over gloo on the CPU, the same global batch."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, SMALL, losses
from safetensors.torch import load_file

from neco import load_backbone
from neco.augment.views import view_rng
from neco.config import validate
from neco.distributed import collectives
from neco.eval.common.neighbors import Neighbours
from neco.training.data import Positions
from neco.training.module import PostTraining
from neco.utils.errors import NecoError

WORLD, IMAGES = 2, 4
VARIANTS = {
    "batch": [],
    "other": ["loss.references=batch_other", "loss.reference_count=7"],
    "any": ["loss.references=batch_any"],
    "queue": ["loss.references=queue", "loss.queue_size=64"],
    "masked": ["loss.mask=fg"],
    "masked queue": ["loss.mask=bg", "loss.references=queue", "loss.queue_size=64"],
    "no teacher": ["train.teacher=none"],
    "contrast": ["loss=infonce"],
    "masked kernels": ["loss=paka", "loss.mask=fg"],
    "prototypes": ["loss=leopart", "loss.prototypes=8"],
    "masked prototypes": ["loss=leopart", "loss.prototypes=8", "loss.mask=bg"],
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def batch(part: slice) -> dict[str, torch.Tensor]:
    """Random pixels and crops of the images of `part`."""
    generator = torch.Generator().manual_seed(3)
    views = validate.load(*SMALL).build("augment").resolve(8, 64)
    crops = [views.sample(view_rng(0, 0, index), 100, 120).crops for index in range(IMAGES)]
    pixels = {
        name: torch.randint(0, 256, (IMAGES, count, 3, size, size), generator=generator, dtype=torch.uint8)
        for name, count, size in (("global_views", 2, 32), ("local_views", 1, 16))
    }
    return {key: value[part] for key, value in {**pixels, "crops": torch.tensor(np.array(crops))}.items()}


def steps(variant: str) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradients of two steps, averaged over the processes as DDP does."""
    settings = validate.load(*SMALL, "train.drop_path=0.5", *VARIANTS[variant])
    torch.manual_seed(0)
    backbone = settings.build("model", drop_path=0.5)
    module = PostTraining(
        backbone, settings.build("head", dim=backbone.dim), settings.build("loss"),
        options=settings.spine["train"], optim=settings.spine["optim"], global_views=2,
        steps=4, seed=0,
    )  # fmt: skip
    part, found = slice(*(IMAGES * r // collectives.world() for r in (collectives.rank(), collectives.rank() + 1))), []
    for index in range(2):
        loss = module.training_step(batch(part), index)
        loss.backward()
        found.append(float(collectives.total(loss.detach())) / collectives.world())
    trained = [p for part in (module.student, module.loss) for p in part.parameters() if p.grad is not None]
    grads = [collectives.total(p.grad) / collectives.world() for p in trained]
    return found, grads


def check_neighbours(rank: int) -> None:
    """A memory of 5 and 15 entries, searched for 3 and 0 and then 0 and 2 queries, is one of 20."""
    generator = torch.Generator().manual_seed(0)
    memory, queries = (torch.randn(rows, 4, generator=generator) for rows in (20, 5))
    own, asked = slice(5 * rank, 5 + 15 * rank), [queries[:3], queries[3:]]
    for engine in ("faiss", "torch"):
        index, whole = (Neighbours(part.contiguous(), engine=engine) for part in (memory[own], memory))
        for turn, part in enumerate(asked):
            wanted, found = whole(part, 9), index.together(part if turn == rank else queries[:0], 9)
            assert len(found[0]) == (len(part) if turn == rank else 0)
            if turn == rank:
                torch.testing.assert_close(found, wanted)
        with pytest.raises(NecoError, match="k=21 nearest of 20 memory entries"):
            index.together(queries, 21)


def work(rank: int, port: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    collectives.join()
    assert (collectives.world(), collectives.rank(), collectives.leader()) == (WORLD, rank, rank == 0)
    rows = torch.arange(rank + 1.0)[:, None].expand(rank + 1, 3)
    assert collectives.gather_uneven(rows)[:, 0].tolist() == [0, 0, 1]
    assert collectives.merge(rank) == [0, 1] and collectives.total(torch.tensor([rank, 1])).tolist() == [1, 2]
    assert [*collectives.share(range(5))] == ([0, 1] if rank == 0 else [2, 3, 4])
    check_neighbours(rank)
    torch.save({variant: steps(variant) for variant in VARIANTS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (free_port(), str(folder)), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_one_process(together, variant):
    loss, grads = steps(variant)
    for found, gradients in (ranks[variant] for ranks in together):
        assert found == pytest.approx(loss, rel=1e-5)
        for one, two in zip(grads, gradients, strict=True):
            assert (one - two).norm() <= 1e-5 * max(one.norm(), 1e-3)
    assert sum(float(g.norm()) for g in grads) > 0.1


def test_one_process_is_alone():
    x = torch.rand(3, 2)
    assert collectives.world() == 1 and collectives.rank() == 0 and collectives.leader()
    assert collectives.gather(x) is x and collectives.gather_uneven(x) is x and collectives.total(x) is x
    assert collectives.merge("a") == ["a"] and collectives.share([1, 2]) == [1, 2]


def test_each_process_reads_its_part(monkeypatch):
    whole = [*Positions(10, 4, 6, 0)]
    monkeypatch.setattr(collectives, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        parts.append([*Positions(10, 4, 6, 0)])
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


LIGHT = ["eval=[retrieval,overcluster]", "eval.retrieval.k=3", "eval.overcluster.k=[4,6]"]
LIGHT += ["dataset.val=5", "extract.batch_size=2"]  # one process has 2 batches, the other 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ("ddp", "fsdp"))
def test_two_devices_train_as_one_and_resume_as_one(neco, train, tmp_path, strategy):
    one = train(*LIGHT, folder="one")
    several = [*SMALL, "device=cpu", "train.devices=2", f"train.strategy={strategy}"]
    said = neco(*several, *LIGHT, f"run_dir={tmp_path / 'two'}")
    if torch.__version__ < "2.8" and "this torch sums gradients on CPUs" in said.stderr:
        assert said.returncode == 2 and not (tmp_path / "two/checkpoints").exists()
        return
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("checkpoint  ") == 1, "one process speaks"
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
    assert losses(tmp_path / "two", "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-3)
    found = [json.loads((folder / "results.json").read_text()) for folder in (one, tmp_path / "two")]
    before, after = ([r for r in found[1] if r["step"] == step] for step in (0, 4))
    assert [r["metrics"] for r in before] == [r["metrics"] for r in found[0] if r["step"] == 0]
    assert all(r["metrics"] for r in after) and len(after) == 4
    features = load_backbone(str(tmp_path / "two"))(torch.zeros(1, 3, 32, 32))
    assert torch.allclose(features, load_backbone(str(one))(torch.zeros(1, 3, 32, 32)), atol=0.05)
    # three steps of two devices, then three of one, as six of one; with parameters of the loss
    clusters = ["loss=leopart", "loss.prototypes=8", "train.steps=6"]
    six = train(*clusters, folder="six")
    more = tmp_path / "more"
    neco(*several, *clusters, "train.save_epochs=1", f"run_dir={more}", ok=True)
    (more / "checkpoints/epoch_0001.ckpt").replace(more / "checkpoints/last.ckpt")
    train(*clusters, "train.save_epochs=1", folder="more")
    assert losses(more) == pytest.approx(losses(six), rel=1e-4)


@pytest.mark.slow
def test_torchrun(neco, tmp_path, cache):
    def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, "-m", "neco", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )

    options = [*SMALL, *LIGHT, "device=cpu", "train.devices=2", f"run_dir={tmp_path / 'run'}"]
    done = torchrun(*options)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 4
    model = ["task=eval", "dataset.train=12", "dataset.val=4", "weights=none", "device=cpu"]
    model += ["eval=[overcluster,linear]", "eval.linear.epochs=3", "eval.linear.batch_size=5", "eval.linear.lr=0.1"]
    done = torchrun(*model, f"run_dir={tmp_path / 'eval'}")
    assert done.returncode == 0, done.stderr
    neco(*model, f"run_dir={tmp_path / 'alone'}", ok=True)
    found = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("eval", "alone")]
    (clusters, head), (clusters_alone, head_alone) = found
    assert clusters["metrics"] == clusters_alone["metrics"]
    assert head["metrics"]["miou"] == pytest.approx(head_alone["metrics"]["miou"], abs=1e-3)
    weights = [load_file(tmp_path / run / head["saved"]["miou"])["0.weight"] for run in ("eval", "alone")]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)
    without = torchrun(*options[:-1])
    assert without.returncode != 0 and "the processes of torchrun must share one folder" in without.stderr
    other = torchrun(*options, "train.devices=1")
    assert "torchrun started 2 processes" in other.stderr


def test_batch_must_split_evenly(neco):
    said = neco("task=train", "train.batch_size=6", "train.devices=4")
    assert (
        said.returncode == 2 and "batch_size=6 cannot be split into accumulate=1 x devices=4 x nodes=1" in said.stderr
    )


@pytest.mark.parametrize(
    ("workers", "device", "sharing", "environment", "readers"),
    [
        (0, "cuda", 1, {}, 0),
        (30, "cpu", 1, {}, 30),
        ("auto", "cpu", 1, {}, 2),
        ("auto", "auto", 1, {}, 2),
        ("auto", "cuda:1", 1, {}, 8),
        ("auto", "cuda", 4, {}, 3),
        ("auto", "cuda", None, {"LOCAL_WORLD_SIZE": "2"}, 7),
        ("auto", "cuda", 16, {}, 1),
        ("auto", "cuda", 2, {"SLURM_CPUS_PER_TASK": "6"}, 2),  # this program starts two processes in a task
        ("auto", "cuda", 4, {"SLURM_CPUS_PER_TASK": "6", "SUBMITIT_EXECUTOR": "slurm"}, 5),  # each is a task
        ("auto", "cuda", 1, {"SLURM_CPUS_PER_TASK": ""}, 8),
    ],
)
def test_readers_share_the_cores(workers, device, sharing, environment, readers, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert collectives.readers(workers, device, sharing) == readers
