"""The fine-tuning step: cross-entropy of each labelled pixel, backbone and decoder trained together.

Legend: B images, S pixels of a crop's side, C classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from neco.augment.colour import normalise
from neco.config import schema
from neco.dataset.base import IGNORE
from neco.distributed import collectives
from neco.model.backbone import Backbone
from neco.model.decoder import Linear, MaskTransformer, Segmenter
from neco.training.base import Module


def build_decoder(options: schema.Finetune, dim: int, classes: int) -> nn.Module:
    """The decoder that `finetune.decoder` names."""
    if options.decoder == "linear":
        return Linear(dim, classes)
    return MaskTransformer(dim, classes, layers=options.decoder_layers, dropout=options.decoder_dropout)


class FineTuning(Module):
    """End-to-end training of a segmenter (arXiv 2105.05633, section 3)."""

    options: schema.Finetune

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        options: schema.Finetune,
        optim: schema.Optim,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(options=options, optim=optim, steps=steps, seed=seed)
        backbone.recompute = options.checkpoint_activations
        self.segmenter = Segmenter(backbone, build_decoder(options, backbone.dim, classes))
        self.segmenter.decoder.register_forward_pre_hook(
            lambda decoder, maps: self.draw_own() if self.training else None
        )

    def parts(self) -> tuple[Backbone, nn.Module, nn.Module]:
        return self.segmenter.backbone, self.segmenter.decoder, nn.Module()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """`batch`: uint8 images (B, 3, S, S), masks (B, S, S); `index`: its number in the run."""
        self.draw(index, len(batch["images"]))
        masks = batch["masks"].long()
        scores = self.segmenter(normalise(batch["images"]))
        each = F.cross_entropy(scores, masks, ignore_index=IGNORE, reduction="none")  # its own sum has no fixed order
        # of all processes, which average their gradients; without one labelled pixel the loss is 0
        labelled = collectives.total((masks != IGNORE).sum()) / collectives.world()
        return self.account(each.sum() / labelled.clamp(min=1))
