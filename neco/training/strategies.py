"""How several devices work on one batch: whole copies of the networks (DDP) or shards of them (FSDP)."""

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from neco.config.schema import Trainings
from neco.distributed import collectives
from neco.utils import processes
from neco.utils.errors import NecoError


def check_devices(options: Trainings, device: torch.device) -> None:
    """Raises NecoError for fewer GPUs than asked for, or other processes than the configuration wants."""
    node = options.node
    wanted = f"{node}.devices={options.devices} x {node}.nodes={options.nodes}"
    if not processes.are_started():
        if options.nodes > 1:
            raise NecoError(f"{node}.nodes={options.nodes}: start one process a device with torchrun or SLURM's srun")
    elif processes.number("WORLD_SIZE") != options.processes:
        one = (
            ""
            if processes.here.started_by != "srun"
            else f", or start one task (--ntasks=1), which starts {node}.devices"
        )
        raise NecoError(f"{processes.describe()}, {wanted} asks for {options.processes}: make them equal{one}")
    elif (local := processes.number("LOCAL_WORLD_SIZE", options.devices)) != options.devices:
        raise NecoError(
            f"{processes.describe()}, {local} of them on this node, {wanted} asks for {options.devices} on each"
        )
    if device.type == "cuda" and options.devices > (there := torch.cuda.device_count()):
        hidden = (
            "; --gpus-per-task and --gpu-bind hide GPUs, --gpus-per-node does not"
            if "SLURM_JOB_ID" in os.environ
            else ""
        )
        raise NecoError(f"{node}.devices={options.devices}: there are {there} GPUs here{hidden}")


class Meeting(Strategy):
    """Of a strategy of several processes: they meet before Lightning would have them wait, deaf to signals."""

    _timeout: timedelta | None

    def setup_environment(self) -> None:
        assert self._timeout is not None
        minutes = self._timeout.total_seconds() / 60
        collectives.join(self.root_device, self._timeout, minutes, getattr(self.launcher, "procs", ()))
        super().setup_environment()


class Copies(Meeting, DDPStrategy):
    """DDP."""


class Shards(Meeting, ModelParallelStrategy):
    """FSDP."""


def environment(options: Trainings) -> ClusterEnvironment:
    """Who starts the processes, for Lightning, which would guess from SLURM's variables."""
    if processes.are_started():
        return TorchElasticEnvironment()
    if options.processes > 1:
        os.environ[processes.PARENT] = str(os.getpid())
    return LightningEnvironment()


def strategy(options: Trainings, device: torch.device) -> Strategy | str:
    """Lightning's strategy for `strategy`, `devices` and `nodes`; each process computes its part of the batch."""
    if options.processes == 1:
        return "auto"
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(minutes=options.wait_minutes + 1)  # `Peers`, which knows for whom, is first
    if options.strategy == "fsdp":  # one file with whole tensors: it resumes with any number of devices
        return Shards(
            data_parallel_size=options.processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=limit,
        )
    return Copies(process_group_backend=backend, timeout=limit, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(network: Any, mesh: Any) -> None:
    """Spread a `Network` over Lightning's mesh: the parameters of a block are whole only while it computes."""
    backbone = network.backbone
    # The last block goes with the rest: its attention is read without calling it.
    for part in (*backbone.net.blocks[:-1], backbone, network.head):
        shard_whole(part, mesh)
    register_fsdp_forward_method(backbone, "forward_attention")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns a view: nothing here writes into it


def shard_whole(module: nn.Module, mesh: Any) -> None:
    """Spread any module: all its parameters are whole while it is called.

    Raises NecoError where gradients would be summed: gloo's averages are sums in torch 2.7.
    """
    if not _averages():
        raise NecoError(
            "strategy=fsdp: this torch sums gradients on CPUs instead of averaging; take a newer one, or ddp"
        )
    fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)  # a teacher has no backward to do it


def reshard(network: nn.Module) -> None:
    """Spread again what a forward pass has left whole: before torch 2.8 the outermost part, as if a backward came."""
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@functools.cache
def _averages() -> bool:
    if dist.get_backend() != "gloo":
        return True
    found = torch.empty(1)
    dist.reduce_scatter_tensor(found, torch.ones(dist.get_world_size()), op=dist.ReduceOp.AVG)
    return float(found) == 1


def local(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """This process's shards; the parameters themselves where nothing is sharded."""
    held: list[Any] = [p.detach() for p in parameters]
    return [p.to_local() if isinstance(p, DTensor) else p for p in held]


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over processes, put together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def plain(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The network itself or, of one that is spread over processes, a copy of what `build` makes.

    For evaluations, in which processes have different numbers of passes: each pass of a spread network needs them all.
    """
    if not any(isinstance(p, DTensor) for p in network.parameters()):
        return network
    with torch.random.fork_rng():
        copy = build()
    copy.load_state_dict({name: whole(value) for name, value in network.state_dict().items()})
    return copy.to(next(network.parameters()).device)


def describe(options: Trainings) -> str:
    """For the announcement of a run."""
    return f", {options.processes} processes ({options.strategy})" if options.processes > 1 else ""
