"""Decoders: shapes for every patch and prefix, and the mask transformer against its definition."""

import pytest
import torch
import torch.nn.functional as F

from neco.model.backbone import Backbone
from neco.model.decoder import Linear, MaskTransformer, Segmenter

NETWORKS = {
    8: ("vit_tiny_patch16_224", {"patch_size": 8}),
    14: ("vit_small_patch14_reg4_dinov2.lvd142m", {}),
    16: ("vit_tiny_patch16_224", {}),
}


@pytest.mark.parametrize("decoder", [Linear, MaskTransformer])
@pytest.mark.parametrize("patch", NETWORKS)
def test_scores_have_the_size_of_the_image(patch, decoder):
    name, arch = NETWORKS[patch]
    backbone = Backbone(name=name, size=4 * patch, arch={"embed_dim": 24, "depth": 1, "num_heads": 2, **arch})
    segmenter = Segmenter(backbone, decoder(24, 5))
    images = torch.randn(2, 3, 2 * patch, 3 * patch)
    scores = segmenter(images)
    assert scores.shape == (2, 5, 2 * patch, 3 * patch) and scores.dtype == torch.float32
    scores.square().sum().backward()
    untrained = [name for name, p in segmenter.named_parameters() if p.grad is None]
    assert untrained == [], "DDP waits for the gradient of every parameter"
    with torch.autocast("cpu", torch.bfloat16):
        half = segmenter(images)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_masks_are_normalised_cosines_of_patches_and_classes():
    torch.manual_seed(0)
    decoder = MaskTransformer(128, 3, layers=2).eval()
    assert [block.attn.num_heads for block in decoder.blocks] == [2, 2] and MaskTransformer(96, 3).blocks[0]
    maps = torch.randn(1, 2, 4, 128)
    tokens = decoder.norm(
        decoder.blocks(torch.cat([decoder.project(maps[0].reshape(8, 128)), decoder.classes[0]])[None])
    )
    scores = torch.empty(1, 3, 2, 4)
    for place in range(8):
        patch = decoder.patch_side(tokens[0, place])
        row = [F.cosine_similarity(patch, decoder.class_side(tokens[0, 8 + c]), dim=0) for c in range(3)]
        row = torch.stack(row)
        scores[0, :, place // 4, place % 4] = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(decoder(maps), scores, atol=1e-4, rtol=1e-3)


def test_dropout_is_for_training_alone():
    decoder, maps = MaskTransformer(32, 3, dropout=0.5), torch.randn(1, 2, 2, 32)
    assert not torch.equal(decoder(maps), decoder(maps))
    decoder.eval()
    assert torch.equal(decoder(maps), decoder(maps))


def test_the_linear_decoder_is_a_linear_layer():
    decoder, maps = Linear(4, 3), torch.randn(2, 5, 6, 4)
    wanted = torch.einsum("bhwd,cd->bchw", maps, decoder.head.weight) + decoder.head.bias[:, None, None]
    torch.testing.assert_close(decoder(maps), wanted)
