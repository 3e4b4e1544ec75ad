"""Compiled blocks: the same run, each shape compiled once, nothing else noticed. Tests compile without C++."""

import pytest
import torch
from conftest import SMALL
from test_task_train import assert_same_run
from torch._dynamo.utils import counters

from neco.config import validate
from neco.training import compiled
from neco.training.callbacks import Loop
from neco.utils.errors import NecoError

EVALUATED = ["eval=[retrieval]", "eval.retrieval.k=3", "extract.workers=0", "extract.cache_dir=null"]
VARIANTS = {
    "plain": ["augment.colour=device", "train.drop_path=0.5", "loss.mask=fg", "train.precision=bf16"],
    "adapters": ["train.lora_rank=2", "train.checkpoint_activations=true", "train.drop_path=0.5"],
    "scales": ["augment.multi_scale=[0.5,1]", "train.teacher=none", "train.blocks=1", "train.steps=6", *EVALUATED],
}


@pytest.fixture
def without_compiler(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_is_the_same_run(train, without_compiler, monkeypatch, variant):
    options = [*VARIANTS[variant], "+model.arch={embed_dim:24,depth:3,num_heads:2}"]
    plain = train(*options, folder="plain")
    assert not counters["stats"]
    programs, real = [], Loop.on_train_batch_start

    def count(self, *arguments):
        programs.append(counters["stats"]["unique_graphs"])
        real(self, *arguments)

    monkeypatch.setattr(Loop, "on_train_batch_start", count)
    assert_same_run(plain, train(*options, "train.compile=true", folder="compiled"))
    assert programs[0] == 0, "compiled for an evaluation"
    first = programs[4 if variant == "scales" else 1]  # by then both scales have come
    assert 0 < first == counters["stats"]["unique_graphs"], "compiled in a later step"
    assert not counters["graph_break"] and not counters["recompile_limit"]


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        (["train.strategy=fsdp", "train.devices=2"], "cpu", "parameters of a block are gathered"),
        ([], "cpu", "no C.. compiler"),
        ([], "cuda", "no C.. compiler"),
    ],
)
def test_what_cannot_be_compiled_is_refused(monkeypatch, caplog, options, place, message):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    chosen = {how: validate.load(*SMALL, *options, f"train.compile={how}").spine["train"] for how in ("true", "auto")}
    with pytest.raises(NecoError, match=rf"^train\.compile=true: .*{message}.*auto or false"):
        compiled.wanted(chosen["true"], torch.device(place))
    with caplog.at_level("INFO", "neco"):
        assert not compiled.wanted(chosen["auto"], torch.device(place))
    assert (message.split()[0] in caplog.text) == (place == "cuda")


def test_compiling_is_the_default_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(compiled, "_missing", lambda *_: "")
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    chosen = [validate.load(*SMALL, f"train.compile={how}").spine["train"] for how in ("auto", "true", "false")]
    assert [[compiled.wanted(options, place) for place in (cpu, gpu)] for options in chosen] == [
        [False, True], [True, True], [False, False],
    ]  # fmt: skip
