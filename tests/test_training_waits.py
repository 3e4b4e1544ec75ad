"""Inside a training step the host never waits for the device: shown on a GPU that is only imagined.

Fake tensors know shapes and devices and hold nothing: what asks for a value (`item`, a boolean index) raises, and each
operation can be asked whether it moves anything between devices.
"""

import inspect
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import SMALL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neco.augment import batched, colour
from neco.augment.views import view_rng
from neco.config import validate
from neco.features import extractor
from neco.training.module import PostTraining, follow

GPU = torch.device("cuda:0")
ASKING = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default, torch.ops.aten._unique2.default,
}  # fmt: skip
OPTIONS = {
    "default": [],
    "worker": ["augment.colour=worker", "augment.local_views=0", "train.clip=1"],
    "queue": ["loss.references=queue", "loss.queue_size=36", "loss.mask=fg", "augment.teacher=clean"],
    "other": ["loss.references=batch_other", "loss.mask=bg", "train.teacher=none", "augment.global_views=3"],
    "any": ["loss.references=batch_any", "loss.similarity=euclidean", "loss.network=odd_even", "train.lora_rank=2"],
    **{loss: [f"loss={loss}"] for loss in ("soft_ce", "infonce", "cosine", "gram", "paka", "leopart")},
    "rotary": ["model=dinov3_vits16", "+model.arch={embed_dim:64,depth:2,num_heads:2}"],
    "shuffled": ["loss=shuffled", "train.blocks=1", "train.checkpoint_activations=true"],
}


def imaginable() -> bool:
    try:
        with FakeTensorMode():
            return torch.ones(2, device=GPU)[:1].device == GPU
    except RuntimeError:
        return False


needs_imagination = pytest.mark.skipif(not imaginable(), reason="runs where torch needs no driver for it: from 2.8")


class Waits(TorchDispatchMode):
    """Notes what the host would wait for: values asked for, and copies between devices but for those that are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        ends = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.ndim}
        sent = kwargs.get("non_blocking") and all(x.device == GPU for x in tree_leaves(result))
        truth = function is torch.ops.aten.index.Tensor and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if function in ASKING or truth or (len(ends) > 1 and not sent):
            ours = [frame for frame in traceback.extract_stack() if "/neco/" in frame.filename]
            self.found.append(f"{function} in {ours[-1].filename}:{ours[-1].lineno}" if ours else str(function))
        return result


def build(options: list[str]) -> tuple[PostTraining, dict[str, Any]]:
    """A module and a batch of four images, whose pixels are zero."""
    settings = validate.load(*SMALL, "augment.colour=device", *options)
    torch.manual_seed(0)
    backbone = settings.build("model", drop_path=0.1)
    views = settings.build("augment").resolve(backbone.patch, backbone.size)
    module = PostTraining(
        backbone, settings.build("head", dim=backbone.dim), settings.build("loss"),
        options=settings.spine["train"], optim=settings.spine["optim"], global_views=views.global_views, steps=10,
        seed=0, clean=views.teacher == "clean",
    )  # fmt: skip
    drawn = [views.sample(view_rng(0, 0, index), 64, 80) for index in range(4)]
    batch: dict[str, Any] = {
        "global_views": torch.zeros(4, views.global_views, 3, 32, 32, dtype=torch.uint8),
        "local_views": torch.zeros(4, views.local_views, 3, 16, 16, dtype=torch.uint8),
        "crops": torch.stack([torch.from_numpy(params.crops) for params in drawn]),
    }
    if views.batched(GPU):
        colours = [batched.parameters(params, views.largest_sigma) for params in drawn]
        batch["colours"] = batched.Colours(*map(torch.stack, zip(*colours, strict=True)))
    return module.train(), batch


def imagine(values: Any) -> Any:
    """The same on the imagined GPU."""
    if isinstance(values, Tensor):
        return torch.empty(values.shape, dtype=values.dtype, device=GPU)
    if isinstance(values, dict):
        return {name: imagine(value) for name, value in values.items()}
    return type(values)(*map(imagine, values))


def place(module: nn.Module) -> None:
    """Put a network on the imagined GPU."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(imagine(p), p.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, imagine(buffer))


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world with a GPU; nothing of it is kept."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    colour._statistics.cache_clear()
    extractor._on.cache_clear()


@needs_imagination
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_waits_for_nothing(request: pytest.FixtureRequest, options: str) -> None:
    module, batch = build(OPTIONS[options])
    request.getfixturevalue("imagined")
    place(module)
    module._device, batch = GPU, imagine(batch)
    optimizer = module.configure_optimizers()
    for step in range(2):  # the first may fill caches
        with Waits() as waits:
            loss = module.training_step(batch, step)
            for p in module.student.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(optimizer, 1.0)
            optimizer.step()
            if module.teacher:
                follow(module.teacher, module.student, 0.9)
    assert loss.device == GPU and optimizer.defaults["fused"]
    assert waits.found == []


@pytest.mark.parametrize("options", OPTIONS)
def test_no_value_is_asked_for_in_a_step_with_its_backward_pass(options: str) -> None:
    module, batch = build(OPTIONS[options])
    optimizer = module.configure_optimizers()
    with Waits() as waits:
        module.training_step(batch, 0).backward()
        module.on_before_optimizer_step(optimizer)
    assert module.metrics["grad_norm"] > 0 and waits.found == []


@needs_imagination
@pytest.mark.parametrize("model", ["tiny", "dinov3_vits16"])
def test_a_batch_is_begun_while_another_is_computed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    backbone = validate.load("task=embed", f"model={model}", "++model.arch.depth=1").build("model").eval()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock())
    request.getfixturevalue("imagined")
    place(backbone)
    reader = extractor.Extract(workers=0)
    for _ in range(2):
        with Waits() as waits:
            result = reader._begin(backbone, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), extractor.STD)
    assert waits.found == []
    (features,) = (x for x in inspect.getclosurevars(result).nonlocals.values() if isinstance(x, Tensor) and x.ndim > 1)
    assert features.device == GPU and features.is_contiguous(), "else the copy makes another on the GPU"


@needs_imagination
def test_waiting_is_noticed() -> None:
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())):
        with Waits() as waits:
            wait(torch.ones(3))
        assert waits.found
        with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            wait(torch.ones(3, device=GPU))
    for move in (lambda x: x.cpu(), lambda x: x.new_tensor([1.0, 2.0]), lambda x: torch.ones(2).to(x)):
        with FakeTensorMode(), Waits() as waits:
            move(torch.ones(2, device=GPU))
        assert waits.found
    with FakeTensorMode(), Waits() as waits:
        torch.ones(2).to(GPU, non_blocking=True)
    assert not waits.found
