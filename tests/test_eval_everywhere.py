"""Every evaluation with every backbone of conf/model, made small: registers, patch 8, 14 and 16, rotary positions."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from eval_support import Files, noisy
from test_eval_rectangular import HERE

from neco.config import discovery, validate
from neco.eval.attention import Attention
from neco.eval.linear import Linear
from neco.eval.overcluster import Overcluster
from neco.eval.retrieval import Retrieval
from neco.eval.unsupervised import Unsupervised

EVALUATIONS = (
    Linear(size=[112, 224], epochs=1),
    Overcluster(size=[112, 224], k=5, seeds=(0,), restarts=1, engine="torch"),
    Retrieval(size=[112, 224], k=3, engine="torch"),
    Attention(size=[112, 224]),
    Unsupervised(size=[112, 224], k=6, k_community=4, seeds=(0,), restarts=1, engine="torch"),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Files:
    rng = np.random.default_rng(0)
    pairs = [noisy(rng, 60, 90, 3) for _ in range(4)]
    made = Files(tmp_path_factory.mktemp("scenes"), 3, train=pairs[:2], val=pairs[2:])
    made.classes = ("background", *made.classes[1:])
    return made


@pytest.mark.parametrize("name", discovery.options("model"))
def test_every_evaluation_takes_every_backbone(name: str, dataset: Files) -> None:
    node = yaml.safe_load(Path(discovery.find("model", name)).read_text())
    heads = node.get("arch", {}).get("num_heads", 3)
    node["arch"] = {**node.get("arch", {}), "embed_dim": 8 * heads, "depth": 2, "num_heads": heads}
    backbone = validate.build(node, "model")
    for evaluation in EVALUATIONS:
        found = evaluation(backbone, dataset, extract=HERE)
        assert "/112x224" in found.protocol and all(0 <= value <= 1 for value in found.metrics.values())
