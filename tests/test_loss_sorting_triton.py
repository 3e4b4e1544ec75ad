"""The Triton engine: who takes it, what it computes in the interpreter, what it compiles to."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from neco.loss import sorting
from neco.loss.relaxation import CAUCHY, RELAXATIONS
from neco.loss.sorting import choose_engine
from neco.utils.errors import NecoError

triton = pytest.importorskip("triton", minversion="3.4", reason="runs where Triton 3.4 or newer is")


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton asks once, when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_triton.py"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout


CASE = dict(network="bitonic", n=49, steepness=100.0, relaxation=CAUCHY, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"n": 256, "relaxation": RELAXATIONS["optimal"]}, None),
        ({"n": 257}, "from 2 up to 256 values, not n = 257"),
        ({"n": 1}, "not n = 1"),
        ({"relaxation": RELAXATIONS["logistic"]}, "no relaxation with exponential tails"),
        ({"network": "odd_even"}, None),
        ({"network": "odd_even", "steepness": 101.0}, "odd_even at steepness 101 in torch.float32 does not"),
        ({"dtype": torch.float64}, "computes in float32"),
        ({"device": torch.device("cpu")}, "needs a GPU, and this is cpu"),
    ],
)
def test_who_takes_it(monkeypatch: pytest.MonkeyPatch, change: dict, reason: str | None) -> None:
    monkeypatch.setattr(sorting, "_triton_broken", lambda device: None)  # CUDA is not there
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = {**CASE, **change}
    assert choose_engine("torch", **case) is sorting._sort_cross_entropy
    assert choose_engine("auto", **case).__module__ == "neco.loss.sorting" + ("" if reason else "_triton")
    if reason:
        with pytest.raises(NecoError, match=f"engine=triton: .*{reason}.*engine=auto takes torch"):
            choose_engine("triton", **case)


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    sorting._triton_broken.cache_clear()
    monkeypatch.setitem(sys.modules, "neco.loss.sorting_triton", None)
    monkeypatch.delattr("neco.loss.sorting_triton", raising=False)
    assert choose_engine("auto", **CASE) is choose_engine("auto", **CASE) is sorting._sort_cross_entropy
    assert caplog.text.count("no sorting by Triton on cuda, torch does it") == 1
    with pytest.raises(NecoError, match="Triton does not work here"):
        choose_engine("triton", **CASE)
    sorting._triton_broken.cache_clear()


def test_refused_before_anything_is_read(inside) -> None:
    code, said = inside("task=train", "loss.engine=triton", "device=cpu")
    assert code and "loss: engine=triton: it needs a GPU, and this is cpu (TRITON_INTERPRET=1" in said


@pytest.mark.parametrize(
    ("network", "n"),
    [("bitonic", 16), ("odd_even", 256), pytest.param("bitonic", 49, marks=pytest.mark.slow)],
)
def test_compiles_for_a_gpu_that_is_not_here(tmp_path: Path, network: str, n: int) -> None:
    """For sm_90, without spilling registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    engine = importlib.import_module("neco.loss.sorting_triton")
    constants = engine.sizes(network, n) | {"RELAXATION": "cauchy", "GRADIENT": True}
    options = {"num_warps": constants.pop("num_warps")}
    types = dict.fromkeys(engine._kernel.arg_names, "*fp32") | {"table": "*i32", "rows": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    places = {name: (place,) for place, name in enumerate(types)}
    source = ASTSource(
        engine._kernel,
        types,
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")},
    )
    try:
        assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"runs where Triton has an assembler: {error}")
    (cubin := tmp_path / "kernel.cubin").write_bytes(assembly["cubin"])
    used = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    # The interpreter does not see it: both permutations have to go through the loop over the two sides
    assert re.search(r"iter_args\(%p\w* = \S+, %q", assembly["ttir"])
    assert int(re.search(r"STACK:(\d+)", used)[1]) == 0 and int(re.search(r"LOCAL:(\d+)", used)[1]) == 0, used
