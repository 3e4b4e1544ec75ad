"""Attention-map quality: does the attention of CLS in the last block find the foreground?

The measure of DINO (Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021), which Leopart and
NeCo report too.

Shapes: B images, H W pixels, h w patches, p pixels of a patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from neco.config.types import PositiveFraction, Size
from neco.dataset.base import IGNORE, Dataset, Sample
from neco.distributed import collectives
from neco.eval.evaluation import Result, background_of, input_size, labelled, size_name
from neco.features.extractor import Extract, PatchFeatures
from neco.model.backbone import Attention as CLSAttention
from neco.model.mask import foreground, heaviest
from neco.report.pictures import glow_over, shown
from neco.utils.errors import NecoError

SIZE = 448


def overlap(kept: Tensor, masks: Tensor, background: int) -> tuple[Tensor, Tensor]:
    """Pixels in both and in either of chosen patches and foreground, those to ignore left out.

    Args:
        kept: bool (B, h, w).
        masks: (B, H, W) of labels and 255.

    Returns: intersection and union, float64 (B,).
    """
    valid = masks != IGNORE
    patch = masks.shape[-1] // kept.shape[-1]
    both = torch.stack([valid, valid & (masks != background)]).double()
    pixels, objects = F.avg_pool2d(both, patch) * patch**2  # of each patch
    inside = (kept * objects).sum((1, 2))
    return inside, (kept * pixels).sum((1, 2)) + objects.sum((1, 2)) - inside


class Attention:
    """Jaccard index of the patches that hold most of the attention with the foreground, mean over the images of val.

    The foreground is every class but the background. Images without any are left out.

    Args:
        size: of the input in pixels, or [height, width]; null = the multiple of the patch nearest to 448 (to the
            data's own size if drawn).
        mass: share of the attention that the chosen patches hold.
        clean: blur the map (sigma 0.6 patches) and drop components of one or two patches, as `loss.mask` does;
            false = the bare threshold, as in DINO.
    """

    def __init__(self, *, size: Size | None = None, mass: PositiveFraction = 0.6, clean: bool = True) -> None:
        self.size, self.mass, self.clean = size, mass, clean
        self.attends = True  # needs the attention of a CLS token

    def plan(self, patch: int, dataset: Dataset) -> tuple[tuple[int, int], int, list[Sample]]:
        """Size of the input, the background class, and the images.

        Raises NecoError for everything that can be seen to fail before the first image is read.
        """
        return input_size(self.size, SIZE, patch, dataset), background_of(dataset), labelled(dataset, "val")

    def names(self, dataset: Dataset) -> list[str]:
        """Of the metrics."""
        return ["jaccard", "jaccard_best_head"]

    def __call__(
        self, backbone: PatchFeatures, dataset: Dataset, *, extract: Extract | None = None, seed: int = 0, show: int = 0
    ) -> Result:
        """Evaluate `backbone`; nothing is random. `show`: so many images are drawn with their attention.

        Returns: metrics `jaccard`, of the mean of all heads, and `jaccard_best_head`, of the head that is best for each
        image (the ground truth says which); details: the same over all pixels at once, and the mean for each head.

        Raises:
            NecoError: the backbone gives no attention, or no image has foreground.
        """
        size, background, samples = self.plan(backbone.patch, dataset)
        attend, extract = CLSAttention(backbone), extract or Extract()
        parts = []
        for _, attention, masks in extract.stream(attend, dataset, collectives.share(samples), size, what="val"):
            heads = attention.permute(0, 3, 1, 2)
            maps = [heads, *heads.split(1, dim=1)]  # of all heads, and of each
            found = [overlap(self._choose(each), masks, background) for each in maps]
            objects = ((masks != IGNORE) & (masks != background)).flatten(1).any(1)
            parts.append(torch.stack([torch.stack(pair) for pair in found], dim=2)[:, objects])
        counts = torch.cat(parts, 1) if parts else torch.zeros(2, 0, attend.dim + 1, dtype=torch.float64)
        inside, union = collectives.gather_uneven(counts.transpose(0, 1)).unbind(1)  # (N, 1 + heads) each
        if not len(union):
            raise NecoError(f"none of {len(samples)} images shows anything but background: there is nothing to find")
        drawn = []
        for rows, attention, masks in extract.stream(attend, dataset, some := shown(samples, show), size, keep=False):
            heads = attention.permute(0, 3, 1, 2)
            for sample, maps, kept, mask in zip(some[rows], heads, self._choose(heads), masks, strict=True):
                both, either = (float(part) for part in overlap(kept[None], mask[None], background))
                drawn.append(glow_over(sample, maps.mean(0), kept, "attention", f"Jaccard {both / max(1, either):.2f}"))
        scores = inside / union
        pixels = inside.sum(0) / union.sum(0)
        return Result(
            self._protocol(size),
            {"jaccard": float(scores[:, 0].mean()), "jaccard_best_head": float(scores[:, 1:].amax(1).mean())},
            {
                "jaccard": {"images": len(scores), "over_pixels": float(pixels[0])},
                "jaccard_best_head": {"heads": scores[:, 1:].mean(0).tolist(), "over_pixels": pixels[1:].tolist()},
            },
            pictures=drawn,
        )

    def _protocol(self, size: Size) -> str:
        how = "blur=0.6/specks<3" if self.clean else "bare"
        return f"attention/{size_name(size)}/mass={self.mass:g}/{how}/mean over images"

    def _choose(self, heads: Tensor) -> Tensor:
        """The chosen patches of attention (B, heads, h, w), heads averaged: bool (B, h, w)."""
        return foreground(heads, self.mass) if self.clean else heaviest(heads.mean(1), self.mass)
