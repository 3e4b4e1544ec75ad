"""Compiled transformer blocks, heads and colours: one program for each shape of input, shared by all blocks."""

import importlib.util
import logging
import os
import shutil

import torch

from neco.config.schema import Train
from neco.training.module import PostTraining
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)

BACKEND = "inductor"


def wanted(options: Train, device: torch.device) -> bool:
    """Whether `train.compile` asks for it. Raises NecoError where it does and that is impossible."""
    if options.compile is False or (options.compile == "auto" and device.type != "cuda"):
        return False
    why = _missing(options, device)
    if why and options.compile is True:
        raise NecoError(f"train.compile=true: {why}; take train.compile=auto or false")
    if why:
        log.info("train.compile=auto: nothing is compiled, %s", why)
    return not why


def compile_step(module: PostTraining, shapes: int) -> None:
    """Compile blocks and heads of student and teacher, and the colours, in place; keys of the state stay as they are.

    Args:
        shapes: sizes of views that will come. Each is compiled when it first comes, and never again.
    """
    import torch._dynamo.config
    import torch._inductor.config

    # Beyond the limits, which count programs that run the same code, blocks would run as if they were not compiled.
    # Frozen ones, adapted ones and the teacher's are programs of their own.
    config, most = torch._dynamo.config, 4 * module.student.backbone.depth * shapes
    config.recompile_limit = max(config.recompile_limit, most)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, most)
    torch._inductor.config.fallback_random = True  # the random numbers of an uncompiled run
    for network in filter(None, (module.student, module.teacher)):
        for part in (*network.backbone.net.blocks, network.head):
            part.compile(backend=BACKEND, dynamic=False)
    module.recolour = torch.compile(module.recolour, backend=BACKEND, dynamic=False)


def _missing(options: Train, device: torch.device) -> str:
    if options.strategy == "fsdp" and options.processes > 1:
        return "with strategy=fsdp the parameters of a block are gathered while it runs"
    compilers = os.environ.get("CXX", "c++"), "g++", "clang++"
    if BACKEND == "inductor" and not any(shutil.which(name) for name in compilers):
        return "there is no C++ compiler (g++, clang++ or what CXX names)"
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than what Triton works on"
    return ""
