"""Decoders that turn a patch map into classes: Segmenter's (Strudel et al. 2021, arXiv 2105.05633).

Shapes: B images, h w patches, D channels, C classes, H W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from neco.model.backbone import Backbone
from neco.model.linear import hasten


class Linear(nn.Module):
    """A linear layer for each patch: (B, h, w, D) -> scores (B, C, h, w)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes)
        self.apply(_initialise)

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(maps).permute(0, 3, 1, 2)


class MaskTransformer(nn.Module):
    """Class embeddings join the patches in a transformer; a mask is how similar patches are to its class.

    (B, h, w, D) -> scores (B, C, h, w): cosines of projected patches and classes, normalised over the classes. As
    published: as wide as the backbone, heads of 64 channels, pre-norm blocks. The cosines are taken in float32: the
    norm over classes would magnify what bfloat16 rounds.

    Args:
        layers: number of blocks.
        dropout: in their attention and MLPs.
    """

    def __init__(self, dim: int, classes: int, *, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        heads = next(n for n in range(max(1, dim // 64), 0, -1) if dim % n == 0)
        self.project = nn.Linear(dim, dim)
        self.classes = nn.Parameter(torch.empty(1, classes, dim))
        drops: dict[str, Any] = {"proj_drop": dropout, "attn_drop": dropout}
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, **drops) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.patch_side, self.class_side = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.mask_norm = nn.LayerNorm(classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.classes, std=0.02)
        for side in (self.patch_side, self.class_side):
            nn.init.normal_(side.weight, std=dim**-0.5)
        hasten(self)

    def forward(self, maps: Tensor) -> Tensor:
        batch, h, w, _ = maps.shape
        patches = self.project(maps.flatten(1, 2))
        tokens = torch.cat([patches, self.classes.expand(batch, -1, -1).to(patches.dtype)], 1)
        tokens = self.norm(self.blocks(tokens))
        patches, classes = self.patch_side(tokens[:, : h * w]), self.class_side(tokens[:, h * w :])
        with torch.autocast(maps.device.type, enabled=False):
            wide = torch.promote_types(patches.dtype, torch.float32)
            patches, classes = (F.normalize(part.to(wide), dim=-1, eps=1e-6) for part in (patches, classes))
            scores = self.mask_norm(patches @ classes.transpose(1, 2))
        return scores.transpose(1, 2).unflatten(-1, (h, w))


class Segmenter(nn.Module):
    """A backbone and a decoder: normalised images (B, 3, H, W), whole patches -> scores (B, C, H, W), bilinear."""

    def __init__(self, backbone: Backbone, decoder: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.patch, self.spec = backbone.patch, backbone.spec

    def forward(self, images: Tensor) -> Tensor:
        scores = self.decoder(self.backbone(images)).float()
        return F.interpolate(scores, size=images.shape[-2:], mode="bilinear")


def _initialise(part: nn.Module) -> None:
    if isinstance(part, nn.Linear):
        nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
