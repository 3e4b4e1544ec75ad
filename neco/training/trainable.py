"""What of the backbone trains."""

from typing import Literal

from neco.config import schema, validate
from neco.model import lora
from neco.model.backbone import Backbone
from neco.utils.errors import NecoError


def chosen_blocks(blocks: Literal["all"] | int | list[int], depth: int) -> list[int]:
    """The blocks that `train.blocks` names, in order. Raises NecoError for one that the backbone does not have."""
    if blocks == "all":
        return list(range(depth))
    listed = range(-blocks, 0) if isinstance(blocks, int) else blocks
    if wrong := [index for index in listed if not -depth <= index < depth]:
        what = f"more than there are, {depth}" if isinstance(blocks, int) else f"no block {wrong[0]} among {depth}"
        raise NecoError(
            f"train.blocks={blocks}: {what}; give all, how many of the last (0 to {depth}) or a list of indices "
            f"({-depth} to {depth - 1})"
        )
    return sorted({index % depth for index in listed})


def restrict(backbone: Backbone, options: schema.Train) -> None:
    """Freeze what `train.blocks` and `train.embeddings` leave out; with `train.lora_rank` add the adapters.

    The final norm trains with the blocks, unless it is adapters that they train.

    Raises NecoError for blocks that are not there, and a rank that makes no sense.
    """
    blocks, depth, rank = chosen_blocks(options.blocks, backbone.depth), backbone.depth, options.lora_rank
    embeddings = options.embeddings
    if embeddings == "auto":
        embeddings = len(blocks) == depth and not rank
    places = {0} if embeddings else set()
    if blocks and not rank:
        places |= {index + 1 for index in blocks} | {depth + 1}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(backbone.place(name) in places)
    if rank and not blocks:
        raise NecoError(f"train.lora_rank={rank}: train.blocks={options.blocks} leaves no block to adapt")
    if rank > backbone.dim:
        raise NecoError(f"train.lora_rank={rank}: more than the width of the backbone, {backbone.dim}")
    for index in blocks if rank else []:
        validate.call(
            lora.adapt, "train.lora_rank", block=backbone.net.blocks[index], rank=rank, alpha=options.lora_alpha
        )


def describe(backbone: Backbone) -> str:
    """What of it trains, in words."""
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    places = {backbone.place(name) for name in trained}
    blocks = [index for index in range(backbone.depth) if index + 1 in places]
    said = ["embeddings"] if 0 in places else []
    if blocks:
        kind = "adapters in " if any("parametrizations" in name for name in trained) else ""
        said.append(kind + ("all blocks" if len(blocks) == backbone.depth else f"blocks {blocks}"))
    if backbone.depth + 1 in places:
        said.append("final norm")
    return ", ".join(said) or "nothing"
