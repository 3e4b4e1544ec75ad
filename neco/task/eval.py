"""task=eval: run the selected evaluations on a backbone."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from neco import report
from neco.config.validate import Settings, build, call
from neco.dataset.base import Dataset
from neco.distributed import collectives
from neco.distributed.devices import choose_device, device_name
from neco.eval.runner import check_evaluations, measure, origin
from neco.logger.trackers import Trackers
from neco.model import weights
from neco.runs import folder, results
from neco.runs.folder import locked
from neco.runs.provenance import model_of, network_name, outline, source_of_weights
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)


@dataclass
class Job:
    """What `prepare` found out."""

    dataset: Dataset
    model: dict[str, Any]
    source: str | None
    which: weights.Which
    beside: str | None
    device: torch.device
    chosen: str


def prepare(settings: Settings) -> Job:
    """Cross-check the configuration and list the files. Raises NecoError for whatever would fail later."""
    device = choose_device(settings.run.device)
    source, which = source_of_weights(settings)
    beside = settings.run.compare
    if beside not in (None, "own"):
        other = replace(settings, run=replace(settings.run, checkpoint=beside, weights="auto"))
        beside, _ = call(source_of_weights, "compare", settings=other)
    model = model_of(settings, source)
    network = outline(model)
    if beside != "own":
        trust = settings.run.trust_pickle
        call(weights.check, "compare", outline=network, source=beside, trust_pickle=trust)
    dataset = settings.build("dataset")
    if not settings.config["eval"]:
        raise NecoError("eval=[]: nothing to evaluate; choose for example eval=[retrieval,overcluster]")
    if not dataset.classes:
        raise NecoError(f"dataset={settings.choices['dataset']} has no labels, so nothing can be evaluated on it")
    chosen = check_evaluations(settings, dataset, network)
    return Job(dataset, model, source, which, beside, device, chosen)


def main(settings: Settings, job: Job, output: Path) -> results.Objective:
    """Evaluate and record; returns the first number of the first evaluation."""
    collectives.join()
    with locked(output, "eval"), Trackers(settings, results.Results(output, writes=collectives.leader())) as trackers:
        if trackers.store.writes:
            what = settings.config, settings.overrides, settings.choices
            folder.describe(output, *what, device_name(job.device))
            folder.note_choice(output, train=job.dataset)
        log.info("evaluation  %s on %s, %s", job.chosen, settings.choices["dataset"], device_name(job.device))
        torch.manual_seed(settings.run.seed)
        backbone = build(job.model, "model")
        trust = settings.run.trust_pickle
        told = weights.load(backbone, job.source, job.which, trust_pickle=trust)
        log.info("%s: %s", network_name(settings, job.model), told)
        network = {"only": "backbone"}.get(told.which, told.which)
        name = settings.choices["dataset"]
        networks, origins = {network: backbone.to(job.device)}, {network: origin(settings, job.source)}
        if job.beside:
            other = build(job.model, "model")
            beside = None if job.beside == "own" else job.beside
            told = call(weights.load, "compare", backbone=other, source=beside, trust_pickle=trust)
            log.info("compared    %s", told)
            networks = {"compared": other.to(job.device), **networks}
            origins["compared"] = origin(settings, beside, of=(origins[network]["model"], job.model))
        found = measure(settings, trackers, networks, origins, job.dataset, name, job.device)
        log.info("\n%s\n\nwrote  %s", results.table(found), trackers.store.path)
        if settings.run.report:
            report.of_run(output)
    return results.Objective.of(found[0])
