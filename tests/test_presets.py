"""Presets against a table typed by hand from METHOD.md and NUMBERS.md, not read from any YAML."""

import re

import pytest

from neco.config import discovery, validate
from neco.loss.relaxation import cauchy
from neco.training.optim import ema_momentum

# name: backbone in timm's words, registers, pixels, batch, epochs, rate of the backbone, references
S14, B14 = "vit_small_patch14_dinov2.lvd142m", "vit_base_patch14_dinov2.lvd142m"
S14R, B14R = "vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m"
S16, SIXTEEN = "vit_small_patch16_224.dino", (224, 96, 45, 50, 1e-5, "batch")
PUBLISHED = {
    "neco_dinov2_vits14": (S14, "keep", 518, 98, 64, 25, 1e-5, "queue"),
    "neco_dinov2r_vits14": (S14R, "keep", 518, 98, 64, 25, 1e-5, "queue"),
    "neco_dinov2r_xr_vits14": (S14R, "drop", 518, 98, 64, 25, 1e-5, "queue"),
    "neco_dinov2_vitb14": (B14, "keep", 518, 98, 16, 25, 5e-6, "queue"),
    "neco_dinov2r_vitb14": (B14R, "keep", 518, 98, 16, 25, 1e-6, "queue"),
    "neco_dinov2r_xr_vitb14": (B14R, "drop", 518, 98, 16, 25, 1e-6, "queue"),
    "neco_dino_vits16": (S16, "keep", *SIXTEEN),
    "neco_timet_vits16": (S16, "keep", *SIXTEEN),
    "neco_leopart_vits16": (S16, "keep", *SIXTEEN),
    "neco_cribo_vits16": (S16, "keep", *SIXTEEN),
    "neco_ibot_vits16": (S16, "keep", *SIXTEEN),
    "neco_224x224": (S14R, "keep", 224, 98, 6, 50, 1e-6, "batch"),
    "neco_518x518": (S14R, "keep", 518, 98, 6, 50, 1e-6, "batch"),
    "ablation": (S14R, "keep", 224, 98, 55, 50, 1e-6, "batch"),
    # not published
    "neco_dinov3_vits16": ("vit_small_patch16_dinov3.lvd1689m", "keep", 512, 96, 64, 25, 1e-5, "queue"),
    "neco_dinov3_vitb16": ("vit_base_patch16_dinov3.lvd1689m", "keep", 512, 96, 16, 25, 1e-6, "queue"),
}
WEIGHTS = {"dino": "hub", "timet": "TimeT", "leopart": "leopart", "cribo": "kuleuven", "ibot": "ibot"}
# dense nearest neighbours, linear, overclustering k=500 on VOC val
EXPECTED = {
    "neco_dinov2_vits14": (78.6, 81.4, 57.7),
    "neco_dinov2r_xr_vits14": (80.2, 81.3, 72.6),
    "neco_dinov2r_vits14": (80.7, 81.5, 68.9),
    "neco_dinov2_vitb14": (82.8, 84.5, 71.1),
    "neco_dinov2r_xr_vitb14": (83.5, 83.3, 71.8),
    "neco_dinov2r_vitb14": (82.9, 84.4, 71.9),
    "neco_dino_vits16": (65.8, 61.3, 47.9),
    "neco_timet_vits16": (66.5, 68.5, 52.1),
    "neco_leopart_vits16": (66.2, 68.3, 55.3),
    "neco_cribo_vits16": (None, 72.1, 59.6),
    "neco_ibot_vits16": (None, 68.6, 51.2),
    "neco_224x224": (78.9, 81.3, 72.6),
    "neco_518x518": (78.9, 81.3, 72.6),
}


def test_no_preset_is_missing_here() -> None:
    assert {*discovery.options("experiment")} == PUBLISHED.keys() | {"demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_was_published(name: str) -> None:
    network, registers, pixels, local, batch, epochs, rate, references = PUBLISHED[name]
    settings = validate.load(f"experiment={name}")
    model, train, optim = settings.config["model"], settings.spine["train"], settings.spine["optim"]
    backbone = settings.build("model")
    assert (model["name"], model.get("registers", "keep")) == (network, registers)
    if len(parts := name.split("_")) > 2 and parts[1] in WEIGHTS:
        assert WEIGHTS[parts[1]] in model["weights"]
    views = settings.build("augment").resolve(backbone.patch, backbone.size)
    assert views.sizes == [(pixels, pixels)] * 2 + [(local, local)] * 4
    augment = settings.config["augment"]
    assert (augment["global_scale"], augment["local_scale"]) == ([0.25, 1], [0.05, 0.25])
    assert (train.batch_size, train.epochs, train.steps, train.teacher) == (batch, epochs, None, "ema")
    assert (train.momentum, train.drop_path, train.clip) == ("auto", 0.1, None)
    coco = 118_287
    assert ema_momentum(train.epochs * (coco // train.batch_size)) == (0.9995, 1), "the published momentum"
    assert (optim.lr, optim.head_lr, optim.weight_decay) == (rate, 1e-4, (0.04, 0.5))
    loss = settings.build("loss")
    assert (loss.references, loss.reference_count, loss.grid, loss.queue_size) == (references, 49, 7, 8192)
    assert (loss.network, loss.relaxation.share, loss.similarity, loss.mask) == ("bitonic", cauchy, "cosine", "all")
    assert loss.steepness == (100, 100)
    head = settings.config["head"]
    assert (head["hidden"], head["out"], head["layers"]) == (2048, 256, 3)
    assert (settings.run.seed, settings.choices["dataset"]) == (400, "coco")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_says_what_to_expect_and_how_to_run_it(name: str) -> None:
    path = discovery.folder() / "experiment" / f"{name}.yaml"
    head = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert (re.search(r"hours|arithmetic", head) and "A100" in head) or "arithmetic of neco_" in head
    assert f"experiment={name} " in head and "python -m neco task=train" in head
    for what, value in zip(("nearest neighbours", "linear", "k=500"), EXPECTED.get(name, ()), strict=False):
        assert value is None or re.search(rf"{what} {value}\b", head.replace("\n# ", " ")), what
