"""What of the backbone trains, and what that costs."""

from itertools import pairwise

import pytest
import torch
from conftest import SMALL
from test_model_backbone import OTHERS, images, values

from neco.config import validate
from neco.model.backbone import Backbone
from neco.training import memory, trainable
from neco.utils.errors import NecoError

DEPTH = 4
ARCH = {"embed_dim": 32, "depth": DEPTH, "num_heads": 2}


def network(name: str = "tiny", depth: int = DEPTH, drop_path: float = 0.0) -> Backbone:
    given = OTHERS[name] if name in OTHERS else values(name)
    return Backbone(**{**given, "arch": {**given.get("arch", {}), **ARCH, "depth": depth}}, drop_path=drop_path)


def restricted(*overrides: str, name: str = "tiny", depth: int = DEPTH) -> Backbone:
    backbone = network(name, depth)
    trainable.restrict(backbone, validate.load(*SMALL, *overrides).spine["train"])
    return backbone


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [("all", [0, 1, 2, 3]), (0, []), (1, [3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), ([], []), ([-1, 1, 3], [1, 3])],
)
def test_blocks_are_chosen(blocks, wanted):
    assert trainable.chosen_blocks(blocks, DEPTH) == wanted


@pytest.mark.parametrize("blocks", [5, [4], [0, -5]])
def test_blocks_that_are_not_there(blocks):
    with pytest.raises(NecoError, match=r"^train\.blocks=.*(there are, 4|no block (4|-5) among 4)"):
        trainable.chosen_blocks(blocks, DEPTH)


EMBEDDINGS = {"cls_token", "pos_embed", "reg_token", "patch_embed", "norm_pre"}
CASES = {  # overrides -> trained blocks, embeddings, final norm
    "": ({0, 1, 2, 3}, True, True),
    "train.embeddings=false": ({0, 1, 2, 3}, False, True),
    "train.blocks=2": ({2, 3}, False, True),
    "train.blocks=[0,-1] train.embeddings=true": ({0, 3}, True, True),
    "train.blocks=0": (set(), False, False),
    "train.blocks=0 train.embeddings=true": (set(), True, False),
}


@pytest.mark.parametrize("name", ["tiny", "dinov2r_vits14", "dinov3_vits16", "clip_vitb16", "eva02"])
@pytest.mark.parametrize("overrides", CASES)
def test_what_trains(overrides, name):
    blocks, embeddings, norm = CASES[overrides]
    backbone = restricted(*overrides.split(), name=name)
    for key, parameter in backbone.net.named_parameters():
        first, second, *_ = [*key.split("."), ""]
        assert first in {*EMBEDDINGS, "norm", "blocks"}, key
        wanted = int(second) in blocks if first == "blocks" else norm if first == "norm" else embeddings
        assert parameter.requires_grad == wanted, key


def test_adapters_train_instead_of_the_blocks():
    backbone = restricted("train.lora_rank=2", "train.blocks=2")
    trained = [name for name, parameter in backbone.net.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[1] for name in trained} == {"2", "3"} and len(trained) == 2 * 2 * 2
    assert all(".parametrizations.weight.0." in name for name in trained)
    assert trainable.describe(backbone) == "adapters in blocks [2, 3]"
    assert restricted("train.lora_rank=2", "train.embeddings=true").net.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], "embeddings, all blocks, final norm"),
        (["train.blocks=[1]"], "blocks [1], final norm"),
        (["train.lora_rank=1"], "adapters in all blocks"),
        (["train.blocks=0"], "nothing"),
    ],
)
def test_what_trains_in_words(overrides, wanted):
    assert trainable.describe(restricted(*overrides)) == wanted


def saved(*overrides: str, recompute: bool = False, depth: int = DEPTH) -> int:
    """Bytes that the estimate counts for 3 images of 4 x 5 patches."""
    backbone = restricted(*overrides, depth=depth).to("meta").train()
    backbone.recompute = recompute
    return memory.saved_for_backward(lambda: backbone(torch.empty(3, 3, 32, 40, device="meta")))


TOKENS = 3 * (1 + 4 * 5) * 32 * 4  # bytes of what goes from block to block


def test_frozen_blocks_in_front_keep_nothing_for_the_backward_pass():
    costs = [saved(f"train.blocks={count}", "train.embeddings=false") for count in range(1, 5)]
    assert saved("train.blocks=0") == 0
    assert {after - before for before, after in pairwise(costs)} == {costs[1] - costs[0]}
    assert costs[1] - costs[0] > 10 * TOKENS
    assert costs[0] < saved("train.blocks=[0]") < costs[3], "behind a trained block, weights only need no inputs"
    backbone = restricted("train.blocks=[2]")
    reached = []
    for index, block in enumerate(backbone.net.blocks):
        block.register_forward_hook(
            lambda module, x, y, index=index: reached.append(index) if y.requires_grad else None
        )
    backbone(images(1, 32, 32)).sum().backward()
    assert reached == [2, 3]


def test_recomputed_blocks_keep_their_input_and_once_the_rest():
    block = (saved() - saved(depth=2)) // 2
    assert saved(recompute=True) - saved(recompute=True, depth=2) == 2 * TOKENS
    assert block + DEPTH * TOKENS <= saved(recompute=True) <= block + DEPTH * TOKENS + saved() - DEPTH * block
    assert saved(recompute=True) < 0.5 * saved()
    assert saved("train.blocks=1", recompute=True) < saved("train.blocks=2", recompute=True)


@pytest.mark.parametrize("name", ["tiny", "dinov3_vits16"])
def test_recomputed_blocks_have_the_same_gradients_and_keep_less(name):
    def run(recompute: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        backbone = network(name, drop_path=0.5)
        backbone.train().recompute = recompute
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = backbone(images(4, 64, 64)).square().sum()
        value.backward()
        return [value, *(p.grad for p in backbone.parameters())], sum(kept.values())

    (plain, much), (recomputed, little) = run(False), run(True)
    assert all(map(torch.equal, plain, recomputed)) and little < much / 3
