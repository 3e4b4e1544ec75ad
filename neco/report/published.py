"""Published numbers, in percent, to stand beside measured ones. None of them is used for anything else.

NeCo: the paper (arXiv 2408.11054) and its repository's tables; DIP: an independent evaluation (2025). Columns of the
repository that are swapped against the paper are put right. Read off a figure, within 0.3: in-context ADE20K of NeCo.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Published(NamedTuple):
    """A number of a backbone of conf/model, before or after NeCo, of which part of the train labels."""

    model: str
    state: Literal["before", "after"]
    dataset: str
    metric: str  # EVALUATION/METRIC
    percent: float
    source: str = "NeCo"
    fraction: float = 1.0


def _rows() -> Iterator[Published]:
    voc = ("overcluster/miou_k500", "retrieval/miou_k30", "linear/miou")
    for model, *values in (
        ("dinov2_vits14", 57.7, 78.6, 81.4),
        ("dinov2r_xr_vits14", 72.6, 80.2, 81.3),
        ("dinov2r_vits14", 68.9, 80.7, 81.5),
        ("dinov2_vitb14", 71.1, 82.8, 84.5),
        ("dinov2r_xr_vitb14", 71.8, 83.5, 83.3),
        ("dinov2r_vitb14", 71.9, 82.9, 84.4),
        ("dino_vits16", 47.9, 65.8, 61.3),
        ("timet_vits16", 52.1, 66.5, 68.5),
        ("leopart_vits16", 55.3, 66.2, 68.3),
    ):
        yield from (Published(model, "after", "voc", name, value) for name, value in zip(voc, values, strict=True))

    clusters = [(data, k) for data, classes in (("voc", 21), ("coco_things", 12)) for k in (classes, 300, 500)]
    for model, state, *values in (
        ("dino_vits16", "before", 4.3, 13.9, 17.3, 5.4, 18.8, 19.2),
        ("timet_vits16", "before", 12.2, 43.6, 46.2, 17.5, 42.7, 44.6),
        ("dinov2r_vits14", "before", 12.2, 46.7, 49.5, 12.3, 38.9, 41.2),
        ("cribo_vits16", "before", 18.3, 51.3, 54.5, 14.5, 46.0, 48.3),
        ("dinov2r_xr_vits14", "after", 17.8, 69.4, 72.6, 18.2, 61.2, 64.5),
    ):
        for (data, k), value in zip(clusters, values, strict=True):
            yield Published(model, state, data, f"overcluster/miou_k{k}", value)  # type: ignore[arg-type]

    others = ("overcluster/miou_k21", "overcluster/miou_k500", "linear/miou")
    for model, before, after in (
        ("ibot_vits16", (4.4, 31.1, 66.1), (15.4, 51.2, 68.6)),
        ("dino_vits16", (4.3, 17.3, 50.2), (14.5, 47.9, 61.3)),
        ("timet_vits16", (12.2, 46.2, 66.3), (17.9, 52.1, 68.5)),
        ("leopart_vits16", (15.4, 51.2, 66.5), (21.0, 55.3, 68.3)),
        ("cribo_vits16", (18.3, 54.5, 71.6), (21.7, 59.6, 72.1)),
    ):
        for name, first, second in zip(others, before, after, strict=True):
            yield Published(model, "before", "voc", name, first)
            yield Published(model, "after", "voc", name, second)

    linear = ("coco_things", "coco_stuff", "voc", "ade20k")
    for model, state, *values in (
        ("dinov2r_vits14", "before", 75.3, 56.0, 74.2, 35.0),
        ("dinov2r_xr_vits14", "after", 82.3, 62.0, 81.3, 40.1),
        ("dinov2r_vitb14", "before", 78.3, 57.6, 79.8, 40.3),
        ("dinov2r_xr_vitb14", "after", 85.5, 63.3, 83.3, 44.9),
    ):
        for data, value in zip(linear, values, strict=True):
            yield Published(model, state, data, "linear/miou", value)  # type: ignore[arg-type]

    for source, data, model, state, *values in (
        ("NeCo", "voc", "dinov2r_vits14", "before", 53.0, 57.9, 68.2, 75.0),
        ("NeCo", "voc", "dinov2r_xr_vits14", "after", 66.5, 70.3, 76.3, 80.2),
        ("NeCo", "ade20k", "dinov2r_vits14", "before", 19.6, 22.8, 30.1, 35.9),
        ("NeCo", "ade20k", "dinov2r_xr_vits14", "after", 23.7, 27.2, 34.0, 39.8),
        ("DIP", "voc", "dinov2r_vits14", "before", 60.7, 67.7, 75.2, 79.4),
        ("DIP", "voc", "dinov2r_vits14", "after", 65.8, 71.5, 77.3, 81.0),
        ("DIP", "ade20k", "dinov2r_vits14", "after", 21.9, 24.1, 32.5, 38.9),
    ):
        for fraction, value in zip((1 / 128, 1 / 64, 1 / 8, 1.0), values, strict=True):
            yield Published(model, state, data, "retrieval/miou_k30", value, source, fraction)  # type: ignore[arg-type]

    for model, value in (("dinov2_vits14", 77.0), ("dinov2_vitb14", 76.9), ("dino_vits16", 46.6)):
        yield Published(model, "before", "voc", "retrieval/miou_k30", value, "Hummingbird")
    yield Published("dinov2r_vits14", "before", "voc", "unsupervised/miou", 35.1)
    yield Published("dinov2r_xr_vits14", "after", "voc", "unsupervised/miou", 55.1)


PUBLISHED = tuple(dict.fromkeys(_rows()))


def find(model: str, state: str, dataset: str, metric: str, fraction: float = 1.0) -> list[Published]:
    """What is published of this, from every source."""
    asked = (model, state, dataset, metric)
    return [row for row in PUBLISHED if row[:4] == asked and abs(row.fraction - fraction) < 1e-9]
