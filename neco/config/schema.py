"""The keys of the configuration that no class of its own takes: the spine. Imports neither torch nor the rest.

Each dataclass is the schema of the node of its name; `neco.config.validate` checks types, `__post_init__` what two keys
say together.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le, MinLen

from neco.config.types import (
    Decay,
    Few,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Pixels,
    Positive,
    PositiveFloat,
    PositiveFraction,
    Seed,
    Size,
    Workers,
)
from neco.utils.errors import NecoError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What the nodes of all trainings have in common. `node` is the name of the node."""

    node: ClassVar[str]
    epochs: Positive
    steps: Positive | None
    batch_size: Positive | Literal["auto"]
    accumulate: Positive
    devices: Few
    nodes: Few
    drop_path: Fraction
    clip: PositiveFloat | None
    precision: Literal["auto", "fp32", "bf16"]
    workers: Workers
    resume: str
    eval_epochs: NonNegative
    patience: Positive | None
    save_epochs: NonNegative
    save_minutes: PositiveFloat
    log_steps: Positive
    wait_minutes: PositiveFloat
    checkpoint_activations: bool
    deterministic: bool

    def __post_init__(self) -> None:
        parts = f"accumulate={self.accumulate} x devices={self.devices} x nodes={self.nodes}"
        if self.batch_size != "auto" and self.batch_size % (self.accumulate * self.processes):
            raise NecoError(f"batch_size={self.batch_size} cannot be split into {parts} equal parts")

    @property
    def processes(self) -> int:
        """Of all nodes, one for each device."""
        return self.devices * self.nodes

    @property
    def micro_batch(self) -> int:
        """Images that a device takes at once."""
        return self.images // self.accumulate // self.processes

    @property
    def images(self) -> int:
        """Of an optimiser step; known once `task=train` has found out what `batch_size=auto` is."""
        assert self.batch_size != "auto"
        return self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Training):
    """How long, what and how is post-trained."""

    node = "train"
    strategy: Literal["ddp", "fsdp"]
    compile: Literal["auto"] | bool
    teacher: Literal["ema", "none", "frozen", "head_ema"]
    momentum: Literal["auto"] | tuple[Fraction, Fraction]
    blocks: Literal["all"] | NonNegative | list[int]
    embeddings: Literal["auto"] | bool
    lora_rank: NonNegative
    lora_alpha: PositiveFloat
    monitor: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.monitor:
            raise NecoError(f"patience={self.patience} waits for monitor=EVALUATION/NETWORK/METRIC to rise: set that")
        if self.lora_rank and self.strategy == "fsdp":
            raise NecoError("strategy=fsdp with lora_rank: what adapters train needs no sharding, use strategy=ddp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """How a backbone is fine-tuned for segmentation, and by which windows it is evaluated."""

    node = "finetune"
    strategy: ClassVar[Literal["ddp"]] = "ddp"
    monitor: ClassVar[str] = "segmentation/segmenter/miou"
    batch_size: Positive
    decoder: Literal["mask_transformer", "linear"]
    decoder_layers: Few
    decoder_dropout: Decay
    crop: Pixels | None
    side: Pixels | Literal["image"] | None
    stride: Pixels | None
    scale: tuple[PositiveFloat, PositiveFloat]
    flip: Fraction
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Ge(0), Le(0.5)]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise NecoError(f"scale={[*self.scale]}: the lower end comes first")


Trainings = Train | Finetune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all sweeps have in common; `neco.sweep.launcher` heeds it."""

    skip_done: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its learning rates (to 0: cosine or, with a power, (1 - part done)^power) and weight decay (cosine)."""

    lr: NonNegativeFloat
    head_lr: NonNegativeFloat
    layer_decay: PositiveFraction
    weight_decay: tuple[NonNegativeFloat, NonNegativeFloat]
    betas: tuple[Decay, Decay]
    power: PositiveFloat | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed:
    """What features of which images are written; `shard_mb` cannot change them."""

    split: str
    size: Size | Literal["native"]
    limit: Pixels
    pool: Literal["none", "mean"]
    dtype: Literal["float16", "float32"]
    shard_mb: PositiveFloat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The keys at the top of the configuration."""

    task: str
    seed: Seed
    run_dir: Annotated[str, MinLen(1)]
    data_root: str
    cache_dir: str
    checkpoint: str | None
    weights: Annotated[str, MinLen(1)]
    trust_pickle: bool
    device: Literal["auto", "cpu", "cuda"]
    debug: bool
    log_seconds: PositiveFloat
    show: NonNegative
    report: bool
    compare: str | None = None
    runs: list[str] = dataclasses.field(default_factory=list)
    formats: set[Literal["html", "markdown", "latex", "csv"]] = dataclasses.field(default_factory=set)
    format: Literal["timm", "dinov2", "safetensors", "onnx"] = "timm"
    file: str | None = None
    results: list[str] = dataclasses.field(default_factory=list)


SPINE: dict[str, type] = {"train": Train, "finetune": Finetune, "optim": Optim, "embed": Embed, "sweep": Sweep}
