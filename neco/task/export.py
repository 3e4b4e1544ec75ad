"""task=export: weights for other programs, with a model card beside them."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neco.config import validate
from neco.config.validate import Settings, build
from neco.model import export, weights
from neco.report import model_card
from neco.runs import folder, foreign, results
from neco.runs.folder import locked
from neco.runs.provenance import model_of, network_name, outline, source_of_weights
from neco.training.run import FREE
from neco.utils.errors import NecoError

log = logging.getLogger(__name__)
# What cannot change a run's weights, or is told elsewhere in the card. Paths are nobody's business.
UNTOLD = FREE | {"task", "show", "model", "checkpoint", "trust_pickle", "dataset.masks"}
PATHS = ("root", "masks", "index", "files")


@dataclass
class Job:
    """What `prepare` found out."""

    model: dict[str, Any]
    source: str | None
    which: weights.Which
    run: Path | None
    records: list[dict[str, Any]]


def prepare(settings: Settings) -> Job:
    """Cross-check the configuration. Raises NecoError for whatever would fail later."""
    run = settings.run
    if settings.config.get("dataset"):
        raise NecoError(f"dataset={settings.choices['dataset']}: an export has none; leave it out")
    source, which = source_of_weights(settings)
    model = model_of(settings, source)
    export.check(outline(model), run.format)
    if run.file:
        target = Path(run.file)
        wanted = Path(export.FILES[run.format]).suffix
        if target.suffix != wanted:
            raise NecoError(f"file={run.file}: format={run.format} writes a {wanted} file; name it so")
        _free(target, run.format)
    checkpoint = Path(source or "")
    folder = next((f for f in (checkpoint.parent.parent, checkpoint.parent) if (f / "config.yaml").is_file()), None)
    folder = folder if checkpoint.is_file() else None
    records = results.Results(folder, writes=False).records if folder else []
    for name in run.results:
        if not (Path(name) / "results.json").is_file():
            raise NecoError(f"results={name}: no run with evaluations: there is no results.json in it")
        records += results.Results(Path(name), writes=False).records
    return Job(model, source, which, folder, records)


def main(settings: Settings, job: Job, output: Path) -> None:
    """Write the weights, read them again, write the card."""
    run = settings.run
    with locked(output, "export"):
        target = Path(run.file or output / export.FILES[run.format])
        _free(target, run.format)
        folder.describe(output, settings.config, settings.overrides, settings.choices, "cpu")
        torch.manual_seed(run.seed)
        backbone = build(job.model, "model")
        report = weights.load(backbone, job.source, job.which, trust_pickle=run.trust_pickle)
        log.info("%s: %s", network_name(settings, job.model), report)
        spec = json.loads(json.dumps(backbone.spec))  # heads and such, which no hash of weights shows
        same = {"weights": report.hash, "spec": spec}
        records = [record for record in job.records if same.items() <= record.items()]
        if run.results and not records:
            others = ", ".join(dict.fromkeys(record["weights"] for record in job.records))
            raise NecoError(
                f"results={run.results}: no number of weights {report.hash} in this network there, but of "
                f"{others or 'none'}"
            )
        way = trained(job.run)

        def beside(told: str) -> dict[str, str]:
            text = model_card.card(backbone, job.model, run.format, target.name, report, told, records, way)
            config = json.dumps(export.timm_config(backbone), indent=2) + "\n"
            return {"README.md": text} | ({"config.json": config} if run.format == "timm" else {})

        try:
            told = export.write(backbone.eval().requires_grad_(False), job.model, run.format, target, beside)
        except OSError as error:
            raise NecoError(f"cannot write {target}: {error.strerror or error}") from error
        log.info("wrote       %s: %s", target, told)
        log.info("wrote       %s", target.with_name("README.md"))


def _free(target: Path, form: export.Format) -> None:
    """Raises NecoError where an export to `target` would overwrite something."""
    beside = ["README.md", *(["config.json"] if form == "timm" else [])]
    for path in (target, *map(target.with_name, beside)):
        if path.exists():
            raise NecoError(f"{path} is there already: give file= or run_dir= a folder of its own")


def trained(run: Path | None) -> model_card.Training | None:
    """How a run's weights were made, from its config; None without a run, or where it trained nothing."""
    try:
        held = foreign.read_config(run) if run else {}
    except NecoError:  # of somebody else
        held = {}
    if not run or not isinstance(task := held.get("task"), str) or task not in model_card.TASKS:
        return None
    defaults, here = flat(validate.load(f"task={task}").config), flat(held)
    shown = {
        key: (value, defaults.get(key))
        for key, value in here.items()
        if value != defaults.get(key) and not UNTOLD & {*_parents(key)} and key.rpartition(".")[2] not in PATHS
    }
    try:
        environment = foreign.read_json(run, "environment.json", foreign.Environment)
        why = f"{run / 'environment.json'} is missing"
    except NecoError as error:
        environment, why = None, str(error)
    if environment is None:
        log.warning("%s: the card does not say where the run took place", why)
    start = held.get("checkpoint") or foreign.lookup(held, "model.weights") or "unknown"
    return model_card.Training(task, str(start), str(held.get("weights")), shown, environment or {})


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by their dotted keys."""
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: list(node) if isinstance(node, tuple) else node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
