"""What only a GPU can show; skipped elsewhere: `python -m pytest tests/test_gpu.py` on a machine with one."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neco.augment.batched import parameters, recolour
from neco.augment.views import Views, view_rng
from neco.config import validate
from neco.distributed.devices import full_precision
from neco.eval.common import neighbors
from neco.eval.common.clustering import kmeans
from neco.eval.common.neighbors import Neighbours
from neco.loss import sorting
from neco.loss.relaxation import choose
from neco.training import compiled
from neco.training.module import PostTraining

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a GPU")
GPU = torch.device("cuda")


def rows(n: int, count: int = 200) -> tuple[Tensor, Tensor]:
    """Similarities of teacher and student that resemble each other, with ties."""
    generator = torch.Generator().manual_seed(n)
    teacher = torch.rand(count, n, generator=generator, dtype=torch.float64) * 2 - 1
    teacher[:, 1::5] = teacher[:, ::5][:, : teacher[:, 1::5].shape[1]]
    student = (teacher + 0.1 * torch.randn(count, n, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    return student, teacher


def result(student: Tensor, teacher: Tensor, *how: object) -> Tensor:
    student = student.clone().requires_grad_()
    loss, entropy = sorting.sort_cross_entropy(student, teacher, *how)  # type: ignore[arg-type]
    loss.sum().backward()
    assert student.grad is not None
    return torch.cat([loss.detach()[:, None], entropy[:, None], student.grad], 1).double().cpu()


@pytest.mark.parametrize("n", [2, 5, 16, 49, 64, 100, 128, 256])
@pytest.mark.parametrize("network", ["bitonic", "odd_even"])
@pytest.mark.parametrize("name", ["cauchy", "reciprocal", "optimal"])
def test_one_kernel_sorts_as_torch_does(name: str, network: str, n: int) -> None:
    relaxation = choose(name)
    steepness = min(relaxation.steepness, relaxation.float32.get(network, math.inf))
    student, teacher = rows(n)
    exact = result(student, teacher, network, steepness, steepness, relaxation, "torch")
    here = student.float().to(GPU), teacher.float().to(GPU)
    found = [result(*here, network, steepness, steepness, relaxation, engine) for engine in ("triton", "triton")]
    assert torch.equal(*found)  # sums have one order
    assert (found[0] - exact)[:, :2].abs().max() < 2e-4 * max(1.0, math.log(n))
    assert (found[0] - exact)[:, 2:].norm() <= 2e-4 * exact[:, 2:].norm() + 1e-9


def test_auto_takes_it() -> None:
    taken = sorting.choose_engine("auto", "bitonic", 49, 100.0, choose("cauchy"), GPU)
    assert taken.__module__ == "neco.loss.sorting_triton"


@pytest.mark.parametrize("compiles", [False, True])
def test_colours_are_the_cpus(compiles: bool) -> None:
    views = Views(global_size=112, local_size=42, jitter_probability=1.0, blur_probability=0.5, grey_probability=0.2)
    image = torch.randint(0, 256, (150, 200, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    call = torch.compile(recolour, dynamic=False) if compiles else recolour
    for index in range(4):
        params = views.sample(view_rng(0, 0, index), *image.shape[:2])
        pixels, colours = views.apply(image, params.plain())[0], parameters(params, views.largest_sigma)
        values = [value[: len(pixels)] for value in colours]
        away = call(pixels.to(GPU), *(value.to(GPU) for value in values)).cpu().int() - recolour(pixels, *values).int()
        assert away.abs().max() <= 2 and (away != 0).float().mean() < 1e-3


def module_and_batch(*overrides: str) -> tuple[PostTraining, dict]:
    settings = validate.load(
        "task=train",
        "weights=none",
        "model=tiny",
        "head.hidden=64",
        "head.out=32",
        "train.batch_size=6",
        "augment.global_size=64",
        "augment.local_size=32",
        *overrides,
    )
    torch.manual_seed(0)
    backbone = settings.build("model", drop_path=settings.spine["train"].drop_path)
    views = settings.build("augment").resolve(backbone.patch, backbone.size)
    module = PostTraining(
        backbone, settings.build("head", dim=backbone.dim), settings.build("loss"),
        options=settings.spine["train"], optim=settings.spine["optim"], global_views=2, steps=10, seed=0,
    )  # fmt: skip
    image = torch.randint(0, 256, (150, 200, 3), generator=torch.Generator().manual_seed(1)).byte().numpy()
    drawn = [views.sample(view_rng(0, 0, index), 150, 200) for index in range(6)]
    pixels = [views.apply(image, params) for params in drawn]
    batch = {
        "global_views": torch.stack([p[0] for p in pixels]),
        "local_views": torch.stack([p[1] for p in pixels]),
        "crops": torch.stack([torch.as_tensor(params.crops) for params in drawn]),
    }
    return module.train(), batch


def moved(batch: dict) -> dict:
    return {name: value.to(GPU) for name, value in batch.items()}


LOSSES = [
    [], ["loss.mask=fg"], ["loss.references=queue", "loss.queue_size=600"], ["loss.references=batch_other"],
    ["loss.network=odd_even"], ["loss.relaxation=logistic"], ["train.teacher=none"], ["loss=soft_ce"],
    ["loss=leopart"], ["loss=paka"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", LOSSES, ids=lambda chosen: " ".join(chosen) or "neco")
def test_a_step_is_the_cpus(overrides: list[str]) -> None:
    found = []
    for place in ("cpu", GPU.type):
        module, batch = module_and_batch("train.drop_path=0", *overrides)
        module.to(place)
        with full_precision():
            loss = module.training_step(moved(batch) if place == GPU.type else batch, 0)
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in module.student.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm() + 1e-7
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("overrides", LOSSES[:3], ids=lambda chosen: " ".join(chosen) or "neco")
def test_no_step_waits_for_the_device(overrides: list[str], compiles: bool) -> None:
    module, batch = module_and_batch(*overrides)
    module.to(GPU)
    batch, optimizer = moved(batch), module.configure_optimizers()
    if compiles:
        compiled.compile_step(module, 2)

    def step(number: int) -> None:
        with torch.autocast(GPU.type, torch.bfloat16):
            loss = module.training_step(batch, number)
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    step(0)  # Triton, cuBLAS and the compiler may wait
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def indeterminate() -> Iterator[None]:
    """Lightning's `deterministic` stays on in the process."""
    yield
    torch.use_deterministic_algorithms(False)


LINEAR = "eval.linear={epochs:1,drop_epoch:1,size:64}"
DETERMINISTIC = {
    "plain": ["train.compile=false", "train.clip=1"],
    "compiled": ["train.compile=true", "loss.mask=fg"],
    "evaluated": ["train.compile=false", "eval=[linear,overcluster]", LINEAR, "eval.overcluster.k=4"],
    "rotary": ["train.compile=false", "model=dinov3_vits16", "+model.arch={embed_dim:64,depth:2,num_heads:2}"],
    "finetune": ["finetune.decoder=linear"],
    "finetune, masks": ["finetune.decoder=mask_transformer", "finetune.clip=1"],
}


@pytest.mark.parametrize("case", DETERMINISTIC)
@pytest.mark.usefixtures("indeterminate")
def test_deterministic_runs_repeat_bit_by_bit(train, finetune, case: str) -> None:
    states, task = [], "finetune" if case.startswith("finetune") else "train"
    for workers in (0, 2):
        chosen = f"device={GPU.type}", f"{task}.deterministic=true", f"{task}.workers={workers}", *DETERMINISTIC[case]
        run = {"train": train, "finetune": finetune}[task](*chosen, folder=f"run{workers}")
        states.append(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluations_are_the_cpus(inside) -> None:
    few = ["dataset.train=12", "dataset.val=6", "extract.workers=0", "weights=none", "model=tiny"]
    found = {}
    for place in ("cpu", GPU.type):
        code, text = inside("task=eval", *few, "eval=[retrieval,overcluster]", f"device={place}", f"run_dir={place}")
        assert code == 0, text
        records = json.loads(Path(place, "results.json").read_text())
        found[place] = {f"{r['evaluation']}/{name}": value for r in records for name, value in r["metrics"].items()}
    assert found["cpu"] and found[GPU.type] == pytest.approx(found["cpu"], abs=0.03)


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [64, 384, 1024])
def test_neighbours_are_those_of_the_cpu(monkeypatch, engine: neighbors.Engine, dtype: torch.dtype, dim: int) -> None:
    if engine == "faiss" and not neighbors.load_faiss().get_num_gpus():
        pytest.skip("runs where faiss was built for GPUs")
    generator = torch.Generator().manual_seed(0)
    memory, queries = (
        torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (5000, 300)
    )
    memory = memory.to(dtype)
    exact = Neighbours(memory, engine="faiss")(queries, 30)
    for entries in (neighbors.GPU_ENTRIES, 1500):
        monkeypatch.setattr(neighbors, "GPU_ENTRIES", entries)
        search = Neighbours(memory, engine=engine, device=GPU)
        found = search(queries, 30)
        rounded = engine == "faiss" and dtype == torch.float16
        assert torch.allclose(found[0].cpu(), exact[0], atol=1e-3 if rounded else 1e-5)
        assert (found[1].cpu() == exact[1]).float().mean() > (0.95 if rounded else 0.999)
        assert engine == "faiss" or search.scale is not None, "by tensor cores"


def test_clusters_are_faiss() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6000, 16, generator=generator).numpy()
    how: dict = dict(iterations=30, restarts=3, sample=1000)
    ours, theirs = (kmeans(points, 20, engine=e, **how, **k) for e, k in (("torch", {"device": GPU}), ("faiss", {})))
    assert ours.objective == pytest.approx(theirs.objective, rel=0.01)
