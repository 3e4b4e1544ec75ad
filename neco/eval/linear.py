"""Linear segmentation: how well a 1x1 convolution on frozen patch features, trained on train, segments val.

Shapes: B images, H W pixels, h w patches, D channels, C classes, L learning rates; G = GRID.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neco.config.types import NonNegative, Positive, PositiveFloat, Size
from neco.dataset.base import Dataset, Sample
from neco.distributed import collectives
from neco.distributed.devices import full_precision
from neco.eval.common import metrics
from neco.eval.common.heads import GRID, Batches, Head, Kind, cross_entropy, load_head, new_head, score
from neco.eval.common.metrics import Compat
from neco.eval.evaluation import Result, Trained, check_protocol, input_size, labelled, part_of_train, size_name
from neco.features.extractor import Extract, PatchFeatures
from neco.model.weights import weights_hash
from neco.report.pictures import Picture, predictions, shown
from neco.runs import foreign
from neco.utils.errors import NecoError
from neco.utils.random import generator

log = logging.getLogger(__name__)
SIZE, LR = 448, 0.01  # published
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # published
FEW, MORE = 200, 16  # steps that may leave a head unfinished (published on VOC: 2,075), images a step that help
HOLDOUT = 0.1  # of train, where it chooses


def _hash(backbone: PatchFeatures) -> str:
    return weights_hash(backbone) if isinstance(backbone, nn.Module) else ""


def _draw(
    head: Head,
    matrix: Tensor,
    dataset: Dataset,
    samples: list[Sample],
    read: Callable[..., Iterable[tuple[slice, Tensor, Tensor]]],
    device: torch.device,
) -> list[Picture]:
    """What the head says of each of the samples, and what it mixes up."""
    predicted: list[Tensor] = []
    for _, tokens, masks in read(samples=samples, keep=False, what="what is shown"):
        with torch.autocast(device.type, enabled=False), full_precision(), torch.no_grad():
            predicted += head(tokens.to(device), tuple(masks.shape[1:])).argmax(1).cpu()
    return predictions(dataset, samples, predicted, matrix)


def _by_class(matrix: Tensor, dataset: Dataset) -> dict[str, Any]:
    iou = metrics.by_class(metrics.class_iou(matrix), dataset.classes)
    return {"iou": iou, **metrics.absent(matrix, dataset.classes)}


class Linear:
    """mIoU on val of heads trained on train: SGD on the cross-entropy at 100 x 100, under random crops and flips.

    `standard` scores the last head at the size of the input, the logits upsampled straight from the token map (as the
    published script for saved heads does). `reference` scores at 100 x 100, masks by torch's `nearest`, keeps of all
    epochs the head that is best on val itself, and counts absent classes as 0.

    Args:
        size: of the input in pixels, or [height, width]; null = the multiple of the patch nearest to 448 (to the
            data's own size if drawn).
        head_kind: `linear`, or `fcn` (on the token map, 512 channels; no published number uses it).
        lr: learning rate, or several: independent heads with the same start, from one pass over the features.
        choose: which of several is `miou`. null = the published 0.01; `train_holdout` = the best on a tenth of train
            that no head is trained on. val never chooses.
        epochs: over train.
        drop_epoch: the first one, counted from 0, with a tenth of the learning rate.
        batch_size: images a step, the rest of an epoch in a smaller one.
        draws: so many fixed draws of crops and flips take turns, their features kept in `extract.cache_dir` (protocol
            `linear_cached`); null = new ones in every epoch.
        shuffled: control: every image has the (whole) mask of another one. What is left is what the place in the image
            says of the class: chance, or more where all images are laid out alike (streets).
        drop_last: of `reference`: images are left out that do not fill a last batch of so many (published: 128);
            0 = none.
        head: a saved head to score, at 100 x 100 and at full size; nothing is trained.

    Raises:
        NecoError: values that contradict each other.
    """

    def __init__(
        self,
        *,
        compat: Compat = "standard",
        size: Size | None = None,
        head_kind: Kind = "linear",
        lr: PositiveFloat | list[PositiveFloat] = LR,
        choose: Literal["train_holdout"] | None = None,
        epochs: Positive = 25,
        drop_epoch: Positive = 20,
        batch_size: Positive = 128,
        draws: Positive | None = None,
        shuffled: bool = False,
        drop_last: NonNegative = 0,
        head: str | None = None,
    ) -> None:
        check_protocol(compat, size, drop_last)
        self.compat = compat
        self.size = size
        self.head_kind = head_kind
        self.lrs = sorted({*lr} if isinstance(lr, list) else {lr})
        self.choose = choose
        self.epochs, self.drop_epoch, self.batch_size = epochs, drop_epoch, batch_size
        self.draws = draws
        self.shuffled = shuffled
        self.drop_last = drop_last
        self.head = head
        if not self.lrs:
            raise NecoError("lr=[]: give at least one learning rate")
        if choose and (compat == "reference" or len(self.lrs) == 1):
            raise NecoError(f"choose={choose}: set compat=standard and several lr, else there is nothing to choose")
        if not choose and len(self.lrs) > 1 and LR not in self.lrs:
            raise NecoError(f"lr={self.lrs}: which is the headline? Add the published {LR} or set choose=train_holdout")

    def plan(
        self, patch: int, dataset: Dataset
    ) -> tuple[tuple[int, int], list[Sample], list[Sample], list[Sample], str | None]:
        """Size of the input; images to train on, to choose by and to score on; hash of the saved head.

        Raises NecoError for everything that can be seen to fail before the first image is read.
        """
        val = labelled(dataset, "val", self.drop_last)
        if self.head:
            _, about, digest = load_head(self.head)
            if (names := foreign.parse_json(about["classes"])) != [*dataset.classes]:
                raise NecoError(f"head={self.head} knows other classes than the data set: {', '.join(names)}")
            of_head = [int(side) for side in about["size"].split("x")]
            size = self.size or (of_head[0], of_head[-1])
            return input_size(size, SIZE, patch, dataset), [], [], val, digest
        size, train = input_size(self.size, SIZE, patch, dataset), labelled(dataset, "train", self.drop_last)
        held = {*generator("holdout").permutation(len(train))[: max(1, round(HOLDOUT * len(train)))]}
        held = held if self.choose else set()
        holdout = [sample for i, sample in enumerate(train) if i in held]
        train = [sample for i, sample in enumerate(train) if i not in held]
        if len(train) < 1 + self.shuffled:
            raise NecoError(
                f"{len(train)} train images left: too few for choose={self.choose}, shuffled={self.shuffled}"
            )
        return size, train, holdout, val, None

    def names(self, dataset: Dataset) -> list[str]:
        """Of the metrics that are there for every head."""
        return ["miou"] + [f"miou_lr{lr:g}" for lr in self.lrs] * (len(self.lrs) > 1 and not self.head)

    def __call__(
        self, backbone: PatchFeatures, dataset: Dataset, *, extract: Extract | None = None, seed: int = 0, show: int = 0
    ) -> Result:
        """Evaluate `backbone`; `seed` is that of the head's start, crops, flips and the order of images;
        `show`: so many images are drawn with what is predicted.

        Returns: metric `miou`, with several learning rates `miou_lr<lr>` of each; for a saved head `miou`, `miou_100`
        and `miou_<size>`. The details hold the IoU of each class, the epoch of the head and the losses; `heads` those
        of all rates.
        """
        extract = extract or Extract()
        if self.head:
            return self._score_saved(self.head, backbone, dataset, extract, show)
        size, train, holdout, val, _ = self.plan(backbone.patch, dataset)
        device, read = extract.place(backbone), partial(extract.stream, backbone, dataset, size=size)
        own = self._pixels(size)
        if (steps := self.epochs * -(-len(train) // self.batch_size)) < FEW:
            log.warning("%d images make %d steps of SGD: too few? batch_size=%d makes more", len(train), steps, MORE)
        batches = Batches(
            backbone, dataset, train, size, extract=extract, seed=seed,
            batch_size=self.batch_size, draws=self.draws, shuffled=self.shuffled,
        )  # fmt: skip
        start = [new_head(self.head_kind, backbone.dim, len(dataset.classes), seed).to(device) for _ in self.lrs]
        heads, losses = self._train(dict(zip(self.lrs, start, strict=True)), batches, device)
        matrices = score(heads, read(samples=collectives.share(val), what="val"), [own], device)
        scores = {run: self._miou(matrix) for (run, _), matrix in matrices.items()}
        best = {lr: max((run for run in heads if run[0] == lr), key=lambda run: scores[run]) for lr in self.lrs}
        chosen, held_out = LR if LR in self.lrs else self.lrs[0], {}
        if holdout:
            last, stream = (
                {lr: heads[best[lr]] for lr in best},
                read(samples=collectives.share(holdout), what="held out"),
            )
            held_out = {lr: self._miou(matrix) for (lr, _), matrix in score(last, stream, [own], device).items()}
            chosen = max(held_out, key=lambda lr: held_out[lr])
        names = {"miou": chosen} | ({f"miou_lr{lr:g}": lr for lr in self.lrs} if len(self.lrs) > 1 else {})
        about = {
            "kind": self.head_kind,
            "dim": str(backbone.dim),
            "classes": json.dumps(dataset.classes),
            "size": size_name(size),
            "patch": str(backbone.patch),
            "weights": _hash(backbone),
        }
        trained = {}
        for name, lr in names.items():
            if name != "miou" or len(names) == 1:
                state = {key: value.cpu() for key, value in heads[best[lr]].state_dict().items()}
                how = "/".join([f"lr={lr:g}", *self._training, *part_of_train(dataset)])
                trained[name] = Trained(state, {**about, "trained": how})
        headline = [f"miou=lr{chosen:g}"] * (len(self.lrs) > 1 and not self.choose)
        return Result(
            "/".join([self._protocol(size, own), *headline, *part_of_train(dataset)]),
            {name: scores[best[lr]] for name, lr in names.items()},
            {
                name: {
                    "lr": lr,
                    "epoch": best[lr][1],
                    "held_out": held_out.get(lr),
                    "loss": losses[lr],
                    **_by_class(matrices[best[lr], own], dataset),
                }
                for name, lr in names.items()
            },
            trained,
            _draw(heads[best[chosen]], matrices[best[chosen], own], dataset, shown(val, show), read, device),
        )

    def _score_saved(self, path: str, backbone: PatchFeatures, dataset: Dataset, extract: Extract, show: int) -> Result:
        size, _, _, val, digest = self.plan(backbone.patch, dataset)
        head, about, _ = load_head(path)
        if int(about["dim"]) != backbone.dim:
            raise NecoError(f"head={path} takes {about['dim']} channels, the backbone gives {backbone.dim}")
        # Not refused: how far a head still fits after the backbone was trained on is worth knowing. But named.
        if other := about["weights"] != (weights := _hash(backbone)):
            log.warning("head=%s was trained on weights %s, these are %s", path, about["weights"], weights)
        device, own = extract.place(backbone), self._pixels(size)
        read = partial(extract.stream, backbone, dataset, size=size)
        stream = read(samples=collectives.share(val), what="val")
        found = score({path: head.to(device)}, stream, [*dict.fromkeys(((GRID, GRID), size))], device)
        scores = {f"miou_{size_name(at)}": self._miou(matrix) for (_, at), matrix in found.items()}
        parts = [
            f"linear_head/{self.compat}/{size_name(size)}",
            f"at={size_name(own)}",
            f"head={digest}",
            about["trained"],
        ]
        parts += ["other_weights"] * other
        return Result(
            "/".join(parts + self._dropped),
            {"miou": scores[f"miou_{size_name(own)}"], **scores},
            {f"miou_{size_name(at)}": _by_class(matrix, dataset) for (_, at), matrix in found.items()}
            | {"head": about},
            pictures=_draw(head, found[path, own], dataset, shown(val, show), read, device),
        )

    def _pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of maps that are compared."""
        return size if self.compat == "standard" else (GRID, GRID)

    def _miou(self, matrix: Tensor) -> float:
        return metrics.miou(matrix, self.compat)

    def _train(
        self, heads: Mapping[float, Head], batches: Batches, device: torch.device
    ) -> tuple[dict[tuple[float, int], Head], dict[float, list[float]]]:
        """Heads by (lr, epoch, from 1): the last, for `reference` all; and the mean loss of each epoch.

        Every process takes the steps on the whole batches, to which each has added its part of the features.
        """
        groups = [{"params": head.parameters(), "lr": lr} for lr, head in heads.items()]
        optimiser = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [self.drop_epoch], 0.1)
        kept: dict[tuple[float, int], Head] = {}
        losses: dict[float, list[float]] = {lr: [] for lr in heads}
        for epoch in range(1, self.epochs + 1):
            found = []
            for batch in batches(epoch - 1, f"train, epoch {epoch} of {self.epochs}"):
                tokens, masks = (collectives.gather_uneven(part).to(device) for part in batch)
                optimiser.zero_grad()
                with torch.enable_grad(), torch.autocast(device.type, enabled=False), full_precision():
                    for head in heads.values():
                        loss = cross_entropy(head(tokens, GRID), masks)
                        loss.backward()
                        found.append(loss.detach())
                optimiser.step()
            schedule.step()
            means = torch.stack(found).reshape(-1, len(heads)).mean(0).tolist()
            for lr, mean in zip(heads, means, strict=True):
                if not math.isfinite(mean):
                    raise NecoError(f"lr={lr:g}: the loss is {mean} in epoch {epoch}; use a smaller learning rate")
                losses[lr].append(mean)
            if self.compat == "reference" or epoch == self.epochs:
                kept |= {(lr, epoch): copy.deepcopy(head).eval() for lr, head in heads.items()}
        # On GPUs the processes' heads differ in the last bits: all score those of the first.
        states = collectives.merge([{k: v.cpu() for k, v in head.state_dict().items()} for head in kept.values()])[0]
        for head, state in zip(kept.values(), states, strict=True):
            head.load_state_dict(state)
        return kept, losses

    def _protocol(self, size: Size, pixels: Size) -> str:
        parts = [
            f"linear{'_cached' * bool(self.draws)}/{self.compat}/{size_name(size)}",
            f"at={size_name(pixels)}",
            f"head={self.head_kind}",
            f"lr={','.join(f'{lr:g}' for lr in self.lrs)}",
            *self._training,
        ]
        return "/".join(parts + [f"choose={self.choose}"] * bool(self.choose) + self._dropped)

    @property
    def _training(self) -> list[str]:
        """How heads are trained, but for the rate."""
        parts = [f"epochs={self.epochs}", f"drop={self.drop_epoch}", f"batch={self.batch_size}"]
        return parts + [f"draws={self.draws}"] * bool(self.draws) + ["shuffled"] * self.shuffled

    @property
    def _dropped(self) -> list[str]:
        return [f"drop_last={self.drop_last}"] * bool(self.drop_last)
