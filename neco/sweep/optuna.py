"""`hydra/sweeper=optuna`: jobs whose values depend on how the jobs before them did."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any, Literal

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins import sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from neco.config.types import Positive, Seed
from neco.config.validate import check
from neco.runs.results import percent, write
from neco.runs.status import status
from neco.sweep.jobs import ASIDE, say
from neco.sweep.launcher import failed, name
from neco.utils.errors import NecoError
from neco.utils.masking import mask_secrets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """`hydra.sweeper` with `hydra/sweeper=optuna`."""

    params: dict[str, Any]
    n_trials: Positive
    n_jobs: Positive
    direction: Literal["maximize", "minimize"]
    seed: Seed
    storage: str | None


class Optuna(sweeper.Sweeper):
    """Hydra's plugin: asks Optuna for trials, runs them by the launcher, tells what they gave."""

    __module__ = "hydra_plugins.neco"  # see neco.__main__

    def __init__(self, **options: Any) -> None:
        plain = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in options.items()}
        self.options = Options(**check(Options, plain, "hydra.sweeper"))

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        if config.get("launcher", {}).get("detach"):
            raise NecoError("launcher.detach=true: a search needs what its jobs give; leave it running, e.g. in tmux")
        self.loader, self.cfg = hydra_context.config_loader, config
        plugins = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        self.runner: Any = Plugins.instance().instantiate_launcher(**plugins)

    def sweep(self, arguments: list[str]) -> float | None:
        """Search until there are n_trials, those of an earlier start included; the best value."""
        try:
            import optuna
        except ImportError as error:
            raise NecoError("hydra/sweeper=optuna: Optuna is missing; pip install 'neco[optuna]'") from error
        given = [*(f"{key}={value}" for key, value in self.options.params.items()), *arguments]
        parsed = {o.get_key_element(): o for o in OverridesParser.create(self.loader).parse_overrides(given)}
        fixed = [f"{k}={o.get_value_element_as_str()}" for k, o in parsed.items() if not o.is_sweep_override()]
        same = [mask_secrets(o) for o in fixed if o.lstrip("+").split("=")[0].split(".")[0] not in ASIDE]
        space = {key: distribution(o) for key, o in parsed.items() if o.is_sweep_override()}
        if not space:
            raise NecoError("hydra/sweeper=optuna: nothing to search; e.g. optim.lr='tag(log, interval(1e-6, 1e-4))'")
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        state = optuna.trial.TrialState
        asked: dict[str, Any] = {"direction": self.options.direction, "searched": sorted(space), "fixed": sorted(same)}
        if self.options.storage:
            asked["run_dir"] = str(folder.absolute())
        study = self.study(folder, asked)
        try:
            # A sampler that starts from the same seed again would repeat its first trials.
            study.sampler = optuna.samplers.TPESampler(seed=self.options.seed + len(study.trials))
            cut = [
                (t.number, t.params) for t in study.get_trials(states=[state.RUNNING])
            ]  # by the end of an earlier start
            while (todo := self.options.n_trials - len(study.trials) + len(cut)) > 0:
                batch, cut = cut[: self.options.n_jobs], cut[self.options.n_jobs :]
                new = [study.ask(space) for _ in range(min(todo, self.options.n_jobs) - len(batch))]
                batch += [(trial.number, trial.params) for trial in new]
                jobs = [[*fixed, *(f"{key}={params[key]}" for key in space)] for _, params in batch]
                for (number, _), job in zip(batch, self.runner.launch(jobs, batch[0][0]), strict=True):
                    good = job.return_value is not None and math.isfinite(job.return_value)
                    study.tell(number, job.return_value if good else None, None if good else state.FAIL)
        except (ValueError, KeyError, optuna.exceptions.OptunaError) as error:
            raise NecoError(
                f"hydra/sweeper=optuna: {error}; another search may be in {folder}: change run_dir"
            ) from error
        if not study.get_trials(states=[state.COMPLETE]):
            if failed:
                return None  # the messages of the jobs say more
            raise NecoError(f"hydra/sweeper=optuna: no trial of task={self.cfg.task} gave a number to go by")
        overrides = [f"{key}={study.best_params[key]}" for key in space]
        place = folder / name([*fixed, *overrides], self.runner.changing)
        number = status(place).get("objective_name", "")
        best = {"objective": number, "value": study.best_value, "overrides": overrides, "folder": str(place)}
        write(folder / "best.yaml", yaml.safe_dump(best, sort_keys=False, allow_unicode=True))
        value = percent(study.best_value)
        say(f"best of {len(study.trials)} trials: {number} {value} % with {shlex.join(overrides)}, in {place}")
        return float(study.best_value)

    def study(self, folder: Path, asked: dict[str, Any]) -> Any:
        """The one in the storage, or a new one. Raises NecoError where that asks something else, or cannot be read."""
        import optuna

        file = folder / "study.db"
        what = "hydra.sweeper.storage" if self.options.storage else str(file)
        try:
            study = optuna.create_study(
                study_name="neco",
                storage=self.options.storage or f"sqlite:///{file.absolute()}",
                direction=self.options.direction,  # of a new one
                load_if_exists=True,
            )
        except Exception as error:  # of Optuna, SQLAlchemy and any driver
            told = str(error).strip().partition("\n")[0]
            raise NecoError(f"{what}: cannot be opened as a study of Optuna: {told}") from error
        held = {"direction": study.direction.name.lower(), **study.user_attrs}
        if differ := [key for key, value in asked.items() if held.get(key, value) != value]:
            told = "; ".join(f"{key} was {held[key]}, is {asked[key]}" for key in differ)
            raise NecoError(f"{what} holds another search ({told}): change run_dir or the storage")
        for key, value in asked.items():
            study.set_user_attr(key, value)
        return study


def distribution(override: Override) -> Any:
    """Where the values of a key come from, as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    kind: Any
    if isinstance(value, ChoiceSweep):
        return CategoricalDistribution([*override.sweep_string_iterator()])
    if isinstance(value, RangeSweep):
        values = [number if isinstance(number, int) else float(number) for number in value.range()]
        kind = IntDistribution if all(isinstance(number, int) for number in values) else FloatDistribution
        return kind(values[0], values[-1], step=value.step)
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    raise NecoError(f"{override.input_line}: wanted are a,b or choice(), range(), interval(), tag(log, interval())")
