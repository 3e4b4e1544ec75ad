"""Any timm ViT as one thing: images (B, 3, H, W) -> patch map (B, h, w, D), and CLS attention when asked.

Shapes: B images, H W pixels, h w patches, g patches per side at the pretraining size, T tokens, D channels.
"""

import difflib
import math
import re
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import DropPath, apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from neco.config.types import MEAN, STD, Fraction, Pixels, Width
from neco.model.linear import hasten
from neco.utils.errors import NecoError

Rule = Literal["hub", "timm", "neco"]
DEEPEST = 256  # blocks; each costs memory and time even without weights, and a file may ask for any number


def interpolate_positions(pos: Tensor, h: int, w: int, rule: Rule, registers: bool) -> Tensor:
    """Resample the position embedding of a square grid, (1, g*g, D) -> (1, h*w, D), bicubic, in float32 or better.

    At h = w = g every rule returns `pos` itself. Elsewhere (`registers`: does the network have register tokens):

    - `hub`: DINOv2's own code. Without registers scale factors (h + 0.1) / g, (w + 0.1) / g and no antialias, which is
      DINO's code too; with registers the exact size and antialias.
    - `timm`: exact size and antialias.
    - `neco`: the published NeCo code, scale factors with 0.1 and no antialias for all.
    """
    g = math.isqrt(pos.shape[1])
    exact = rule == "timm" or (rule == "hub" and registers)
    symbols = isinstance(h, torch.SymInt) or isinstance(w, torch.SymInt)  # an export for all sizes
    if not symbols and (h, w) == (g, g):
        return pos
    if symbols or (pos.is_cuda and torch.are_deterministic_algorithms_enabled()):  # torch's own has no such gradient
        return _resampled(pos, h, w, exact)
    grid = pos.to(torch.promote_types(pos.dtype, torch.float32)).reshape(1, g, g, -1).permute(0, 3, 1, 2)
    if exact:
        grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
    else:  # the given factor, not h / g, maps the coordinates: that is the published behaviour, not a rounding detail
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / g, (w + 0.1) / g), mode="bicubic")
    return grid.permute(0, 2, 3, 1).reshape(1, h * w, -1).to(pos.dtype)


def _resampled(pos: Tensor, h: int, w: int, exact: bool) -> Tensor:
    """`interpolate_positions` as two matrix products without a branch on h or w, so that both may be symbols."""
    g = math.isqrt(pos.shape[1])
    cells, rows, columns = (torch.arange(n, device=pos.device) for n in (g, h, w))
    last = rows.max(), columns.max()
    offset = 0.0 if exact else 0.1 * ~((last[0] == g - 1) & (last[1] == g - 1))  # none at h = w = g

    def matrix(places: Tensor, last: Tensor) -> Tensor:
        """Weights (n, g) of the cells for n places."""
        scale = g / (last + 1 + offset)
        centres = (places[:, None] + 0.5) * scale - 0.5
        if exact:  # the kernel is as wide as what a place covers, and ends at the border
            weights = _cubic((cells - centres) / scale.clamp(min=1), -0.5)
            return weights / weights.sum(1, keepdim=True)
        taps = centres.floor() + torch.arange(
            -1, 3, device=pos.device
        )  # four, those beyond the border stand for the cell there
        return (_cubic(taps - centres, -0.75)[..., None] * (taps.clamp(0, g - 1)[..., None] == cells)).sum(1)

    grid = torch.einsum("hi,wj,ijd->hwd", matrix(rows, last[0]), matrix(columns, last[1]), pos.reshape(g, g, -1))
    return grid.reshape(1, h * w, -1)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel."""
    x = x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * a * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


class Backbone(nn.Module):
    """A ViT of timm (`VisionTransformer`: DINO, DINOv2, ...; `Eva`: DINOv3, ...), built with random weights.

    `neco.model.weights.load` fills it. Attributes: `patch`, `dim`, `depth`, `size`; `net`, the timm network;
    `spec`, what features depend on besides the weights (for cache keys); `recompute`, set it to keep of each block only
    its input and compute the rest again in the backward pass: same gradients, less memory.

    Args:
        name: timm's name of the network, with its tag (`vit_small_patch14_dinov2.lvd142m`).
        size: input size at which it was pretrained, in pixels: what its position embedding was made for.
            Inputs may be any multiple of the patch.
        pos_interp: how the position embedding is resampled for other inputs, see `interpolate_positions`
            (no effect on networks with rotary positions only).
        registers: `drop` throws the register tokens away (`dinov2r_xr`); `hub` then resamples as without registers.
        weights: where `load` looks when it isn't told: hub, none, a hub name, a URL, a file, or `package:FILE`.
        inputs: mean and standard deviation of the pixels that it was trained on. Images come with ImageNet's, which
            `clip` changes to CLIP's.
        drop_path: stochastic depth of the last block, linear over depth from 0 in the first; only while training.
        arch: numbers that replace those of the named network.

    Raises:
        NecoError: timm has no such network or it is no plain ViT, the size isn't a multiple of the patch,
            or there are no registers to drop.
    """

    change: Tensor  # (2, 3, 1, 1): factor and summand of each colour

    def __init__(
        self,
        *,
        name: str,
        size: Pixels,
        pos_interp: Rule = "hub",
        registers: Literal["keep", "drop"] = "keep",
        weights: str = "hub",
        inputs: Literal["imagenet", "clip"] = "imagenet",
        drop_path: Fraction = 0.0,
        arch: dict[Literal["embed_dim", "depth", "num_heads", "patch_size"], Width] | None = None,
    ) -> None:
        super().__init__()
        arch = {**arch} if arch else {}
        if (depth := arch.get("depth", 1)) > DEEPEST:
            raise NecoError(f"model.arch.depth={depth}: networks of at most {DEEPEST} blocks are built")
        self.net = _build(name, img_size=size, drop_path_rate=drop_path, **arch)
        self.patch: int = self.net.patch_embed.patch_size[0]
        self.dim: int = self.net.embed_dim
        self.depth = len(self.net.blocks)
        self.size, self.pos_interp, self.weights = size, pos_interp, weights
        self.recompute = False
        self.rotary: dict[tuple[Any, ...], Tensor] = {}  # embeddings by the size of the grid
        self.spec: dict[str, Any] = dict(name=name, size=size, pos_interp=pos_interp, registers=registers, arch=arch)
        if inputs == "clip":
            self.spec["inputs"] = inputs
            ours, theirs = torch.tensor((MEAN, STD)), torch.tensor((OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
            change = torch.stack([ours[1], ours[0] - theirs[0]]) / theirs[1]
            self.register_buffer("change", change[:, :, None, None], persistent=False)
        self.inputs = inputs
        if size % self.patch:
            raise NecoError(f"model.size={size} is no multiple of the patch of {name}, {self.patch} pixels")
        if registers == "drop":
            self._drop_registers()
        hasten(self.net)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> patch tokens of the last block after the final norm, (B, h, w, D).

        Raises NecoError for other tensors, and when H or W is not a multiple of the patch.
        """
        tokens, rope, (h, w) = self._embed(images)
        for block in self.net.blocks:
            tokens = self._block(block, tokens, rope)
        return self._patches(tokens, h, w)

    def attention(self, images: Tensor) -> Tensor:
        """Attention (B, heads, h, w) from CLS to the patches in the last block: see `forward_attention`."""
        return self.forward_attention(images)[1]

    def forward_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch map (B, h, w, D) and attention (B, heads, h, w), float32, of one pass.

        The attention is the softmax over all T tokens, as the network uses it; CLS and registers are then left out,
        so a map sums to less than 1. Only the row of CLS is computed: the block itself stays fused.
        """
        self._needs_cls()
        tokens, rope, (h, w) = self._embed(images)
        *blocks, last = self.net.blocks
        for block in blocks:
            tokens = self._block(block, tokens, rope)
        attention = _cls_attention(last, tokens, rope)[..., self.prefix :]
        return self._patches(self._block(last, tokens, rope), h, w), attention.unflatten(-1, (h, w))

    @property
    def architecture(self) -> str:
        """timm's name without its tag, which names weights of timm that this network need not have."""
        return str(self.spec["name"]).partition(".")[0]

    @property
    def heads(self) -> int:
        """Of the attention of the last block. Raises NecoError where there is no CLS token."""
        self._needs_cls()
        return self.net.blocks[-1].attn.num_heads

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: CLS and registers."""
        return self.net.num_prefix_tokens

    def place(self, name: str) -> int:
        """Where a parameter of this module stands: 0 before the blocks, 1..depth in a block, depth + 1 after them."""
        if found := re.match(r"net\.blocks\.(\d+)\.", name):
            return 1 + int(found.group(1))
        return self.depth + 1 if name.startswith("net.norm.") else 0

    def _needs_cls(self) -> None:
        if self.net.cls_token is None:
            raise NecoError(f"{self.spec['name']} has no CLS token: there is no attention of it to the patches")

    def _block(self, block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(_apply, block, tokens, rope, use_reentrant=False)
        return _apply(block, tokens, rope)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Tokens (B, T, D) before the first block, rotary embedding or None, (h, w)."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            given = f"{tuple(images.shape)} of {images.dtype}".replace("torch.", "")
            raise NecoError(f"images (B, 3, H, W) of normalised floating-point numbers are wanted, not {given}")
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise NecoError(f"images of {height}x{width} pixels: both must be multiples of the patch, {self.patch}")
        if self.inputs == "clip":
            images = images * self.change[0].to(images.dtype) + self.change[1].to(images.dtype)
        net, tokens = self.net, self.net.patch_embed(images)
        batch, h, w, _ = tokens.shape
        tokens = tokens.flatten(1, 2)
        prefix = [token for token in (net.cls_token, net.reg_token) if token is not None]
        if net.pos_embed is not None:  # the prefix has positions of its own unless timm folded them into its tokens
            own = 0 if net.no_embed_class else self.prefix
            positions = net.pos_embed[:, own:]
            tokens = tokens + interpolate_positions(positions, h, w, self.pos_interp, net.reg_token is not None)
            if own:
                prefix = [torch.cat(prefix, 1) + net.pos_embed[:, :own]]
        tokens = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), tokens], 1)
        return net.norm_pre(tokens), self._rotary(h, w), (h, w)

    @torch.inference_mode(False)  # a tensor that a later gradient may meet
    def _rotary(self, h: int, w: int) -> Tensor | None:
        """Rotary embedding of a grid or None; kept: timm makes it on the CPU, and a GPU's host would wait for that."""
        rope = getattr(self.net, "rope", None)
        if rope is None:
            return None
        symbols = isinstance(h, torch.SymInt) or isinstance(w, torch.SymInt)
        if symbols or (self.training and getattr(rope, "aug_active", False)):  # DINOv3's, if it was asked to
            return rope.get_embed(shape=(h, w))
        place = next(rope.buffers())
        key = h, w, place.device, place.dtype
        if key not in self.rotary:
            self.rotary = {**dict([*self.rotary.items()][-7:]), key: rope.get_embed(shape=(h, w))}
        return self.rotary[key]

    def _patches(self, tokens: Tensor, h: int, w: int) -> Tensor:
        return self.net.norm(tokens)[:, self.prefix :].unflatten(1, (h, w))

    def _drop_registers(self) -> None:
        net = self.net
        if net.reg_token is None or not (net.pos_embed is None or net.no_embed_class):
            raise NecoError(f"model.registers=drop: {self.spec['name']} has no registers that can be dropped")
        net.num_prefix_tokens -= net.reg_token.shape[1]
        net.reg_token, net.num_reg_tokens = None, 0
        for block in net.blocks:
            if hasattr(block.attn, "num_prefix_tokens"):  # rotary attention must know what not to rotate
                block.attn.num_prefix_tokens = net.num_prefix_tokens


class StochasticDepth(DropPath):
    """timm's, the rate held in a tensor: compiled, blocks of all rates are one program.

    Attributes:
        split: (processes, this one, its images) of a batch that several processes share. Each draws the numbers of all
            and takes those of its images, so that the number of processes changes nothing. Rows are view after view.
    """

    keep: Tensor
    split: tuple[int, int, int] = (1, 0, 0)

    def __init__(self, drop_prob: float) -> None:
        super().__init__(drop_prob)
        self.register_buffer("keep", torch.tensor(1 - drop_prob), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        world_size, rank, images = self.split
        kept = torch.rand(world_size * len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        if world_size > 1:
            kept = kept.unflatten(0, (-1, world_size, images))[:, rank].flatten(0, 1)
        return x * (kept / self.keep.clamp(min=1e-6)).to(x.dtype)  # at a rate of 1 nothing is kept, and no 0 / 0


class Attention(nn.Module):
    """The attention of CLS as features of the patches: (B, 3, H, W) -> (B, h, w, D), where D is the number of heads.

    Raises NecoError for a backbone that has none.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        if not hasattr(backbone, "forward_attention"):
            raise NecoError(f"{type(backbone).__name__} gives no attention of a CLS token")
        self.backbone, self.patch, self.dim = backbone, backbone.patch, backbone.heads

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.forward_attention(images)[1].permute(0, 2, 3, 1)


def _build(name: str, **arch: Any) -> Any:
    if not timm.is_model(name):  # also keeps timm from reading names such as hf-hub:... as a download
        near = difflib.get_close_matches(name, timm.list_models(["vit*", "deit*", "eva*"], pretrained=True), 1)
        raise NecoError(f"model.name={name}: timm has no such network{f'; did you mean {near[0]}?' if near else ''}")
    try:
        net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", dynamic_img_size=True, **arch)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise NecoError(f"model.name={name} cannot be built by timm with {arch}: {error}") from error
    if type(net) not in (VisionTransformer, Eva) or getattr(net, "rope_mixed", False):
        raise NecoError(f"model.name={name} is a {type(net).__name__}; a plain VisionTransformer or Eva is needed")
    for place, part in [*net.named_modules()]:
        if isinstance(part, DropPath):
            net.set_submodule(place, StochasticDepth(part.drop_prob))
    return net


def _apply(block: nn.Module, tokens: Tensor, rope: Tensor | None) -> Tensor:
    return block(tokens) if rope is None else block(tokens, rope=rope)


def _cls_attention(block: Any, tokens: Tensor, rope: Tensor | None) -> Tensor:
    """Softmax attention (B, heads, T) of the first token to all tokens in a pre-norm block, from the block's input."""
    if type(block) not in (Block, EvaBlock) or getattr(block.attn, "num_kv_groups", 1) > 1:
        raise NecoError(f"attention is not defined for {type(block).__name__} with {type(block.attn).__name__}")
    attn, x = block.attn, block.norm1(tokens)
    if attn.qkv is None:
        q, k = attn.q_proj(x[:, :1]), attn.k_proj(x)
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        (wq, wk, _), (bq, bk, _) = attn.qkv.weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)
        q, k = F.linear(x[:, :1], wq, bq), F.linear(x, wk, bk)
    q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k))  # (B, heads, 1 or T, D / heads)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        own = attn.num_prefix_tokens
        k = torch.cat([k[:, :, :own], apply_rot_embed_cat(k[:, :, own:], rope, half=attn.rotate_half)], 2)
    with torch.autocast(tokens.device.type, enabled=False):  # bf16 products would move a sharp softmax
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        return (q * attn.scale @ k.transpose(-2, -1)).softmax(-1)[:, :, 0]
