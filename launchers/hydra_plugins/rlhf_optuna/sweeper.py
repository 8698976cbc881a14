"""The sweeper that Hydra calls: ask for a batch, launch it, tell how it went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from rlhf_exp.errors import InputError

if TYPE_CHECKING:
    from hydra_plugins.rlhf_optuna._space import Space
    from hydra_plugins.rlhf_optuna._study import Asked, Study

INSTALL = "hydra/sweeper=optuna needs optuna: pip install 'rlhf-exp[optuna]'"
TRIES = 3  # launches of a trial that is interrupted again and again while the sweep goes on
ELSEWHERE = 2.0  # seconds until it is asked again after a trial that another process has
WAYS = ("maximize", "minimize")
REPORTED = (
    "objective",
    "gold",
)  # objectives that running trials report without being told (sweeps/pruning.py)


class OptunaSweeper(Sweeper):
    """The arguments are the keys of config.OptunaConf."""

    def __init__(self, **settings: Any):
        self.settings = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in settings.items()
        }
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None
        self._tries: Counter[int] = Counter()  # launches of each trial

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        _require(self.settings)
        if OmegaConf.select(config, "hydra.launcher.wait") is False:
            raise InputError(
                "hydra/sweeper=optuna chooses trials by the results of others: leave out hydra.launcher.wait=false"
            )
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run what the study still lacks of its n_trials; returns the jobs that ran."""
        from hydra_plugins.rlhf_optuna import _results

        sweep = Path(str(self.config.hydra.sweep.dir))
        sweep.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, sweep / "multirun.yaml")  # as Hydra's own sweepers do
        study, n_trials = self._study(sweep, arguments)
        size = self._at_once()
        study.settle_ended()
        jobs: list[JobReturn] = []
        while batch := study.batch(size, n_trials):
            told = self._run(study, batch)
            jobs += told
            _results.write(study)
            if not told:
                break  # a launcher that gives nothing back would be asked for ever
        for line in _results.lines(study):
            print(line, flush=True)
        return jobs

    def check(self, arguments: Sequence[str]) -> None:
        """Raises InputError for a search that cannot be, before anything is made."""
        from hydra_plugins.rlhf_optuna import _samplers, _study

        space, _, _ = self._search(arguments)
        _samplers.sampler(self.settings["sampler"], space, 0, 0)
        _samplers.pruner(self.settings["pruner"])
        if self.settings["storage"] is not None:
            _study.check_storage(self.settings["storage"])

    def _search(self, arguments: Sequence[str]) -> tuple[Space, list[str], list[str]]:
        """The space, the objectives and their directions."""
        from hydra_plugins.rlhf_optuna import _space

        given = self.settings
        space = _space.read(
            arguments, given.get("params"), given.get("search_space"), self.hydra_context.config_loader
        )
        if not space.searched:
            raise InputError("optuna has nothing to search over: give a key an interval, range or choice")
        objectives = [str(name) for name in given["objectives"]]
        directions = _directions(objectives, given["direction"], _reports_loss(self.config))
        if not str(given["pruner"].get("_target_")).endswith("NopPruner"):
            _check_pruned(objectives, OmegaConf.select(self.config, "early_stop.metric"))
        return space, objectives, directions

    def _study(self, sweep: Path, arguments: Sequence[str]) -> tuple[Study, int]:
        """The study, and how many trials it is to have."""
        from hydra_plugins.rlhf_optuna import _samplers
        from hydra_plugins.rlhf_optuna._study import Study

        given = self.settings
        space, objectives, directions = self._search(arguments)
        n_trials = given["n_trials"]
        if _samplers.is_grid(given["sampler"]):
            size = 1
            for values in space.grid().values():
                size *= len(values)
            n_trials = min(n_trials, size)
        study = Study(
            sweep,
            space,
            directions,
            objectives=objectives,
            sampler=given["sampler"],
            pruner=given["pruner"],
            storage=given["storage"],
            name=given["study_name"],
        )
        known = len(study.trials())
        state = f", {known} of them there already" if known else ""
        print(f"study {study.study.study_name}: {n_trials} trials{state}; {study.storage}", flush=True)
        return study, n_trials

    def _at_once(self) -> int:
        if self.settings["n_jobs"]:
            return self.settings["n_jobs"]
        return max(1, getattr(self.launcher, "at_once", None) or 1)

    def _run(self, study: Study, batch: Sequence[Asked]) -> list[JobReturn]:
        """Launch a batch, and tell what came of each trial."""
        from hydra_plugins.rlhf_optuna import _outcome, _watch
        from optuna.trial import TrialState

        from rlhf_exp.sweeps import trial

        found = []
        for part in _runs(batch):  # launchers number from a first one on
            with _watch.watching(study, part, self.settings["poll_seconds"]):
                jobs = self.launcher.launch([one.overrides for one in part], initial_job_idx=part[0].number)
            for asked, job in zip(part, jobs, strict=True):
                verdict = _outcome.of(study.sweep, asked.number, job, study.objectives)
                if verdict.state is None and trial.is_running(study.sweep / str(asked.number)):
                    time.sleep(ELSEWHERE)  # a launcher that was killed has left it behind; it will end
                    continue
                self._tries[asked.number] += 1
                if verdict.state is None and self._tries[asked.number] >= TRIES:
                    verdict = _outcome.Verdict(TrialState.FAIL, reason=f"{verdict.reason}, {TRIES} times")
                self._check_direction(verdict.metric, study)
                study.settle(asked.trial, verdict)
                if job.status == JobStatus.COMPLETED and verdict.state == TrialState.FAIL:
                    print(f"trial {asked.number}: counts as failed: {verdict.reason}", flush=True)
            found += jobs
        return found

    def _check_direction(self, metric: str | None, study: Study) -> None:
        """That a direction which nobody gave is that of the metric which the trials turn out to report."""
        from hydra_plugins.rlhf_optuna import _outcome

        if (
            metric is None
            or self.settings["direction"] is not None
            or study.objectives != [_outcome.OBJECTIVE]
        ):
            return
        right = WAYS[_outcome.minimised(metric)]
        if study.study.direction.name.lower() != right:
            raise InputError(
                f"the trials report {metric}: set hydra.sweeper.direction={right} (in another hydra.sweep.dir), "
                "or hydra.sweeper.objectives=[...]"
            )


def _require(settings: dict[str, Any]) -> None:
    """That the extra is installed. Raises InputError."""
    try:
        import optuna

        if str((settings.get("sampler") or {}).get("_target_")).endswith("CmaEsSampler"):
            import cmaes  # noqa: F401
    except ImportError as error:
        missing = f" ({error.name} is missing)" if error.name != "optuna" else ""
        raise InputError(INSTALL + missing) from None
    if int(optuna.__version__.partition(".")[0]) < 4:
        raise InputError(f"{INSTALL} (version 4 or later; this is {optuna.__version__})")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in ("n_trials", "n_jobs"):
        if settings.get(name) is not None and settings[name] < 1:
            raise InputError(f"hydra.sweeper.{name} must be at least 1, got {settings[name]}")
    if not settings.get("poll_seconds", 1.0) > 0:
        raise InputError(f"hydra.sweeper.poll_seconds must be above 0, got {settings['poll_seconds']}")


def _check_pruned(objectives: Sequence[str], metric: str | None) -> None:
    """That what running trials report is what is optimised. Raises InputError."""
    if len(objectives) > 1:
        raise InputError("hydra/sweeper/pruner: optuna prunes for one objective only, this study has several")
    if metric is None and objectives[0] not in REPORTED:
        raise InputError(
            f"hydra/sweeper/pruner: the objective is {objectives[0]}, running trials report their score: set "
            "early_stop.metric to what metrics.jsonl calls it"
        )


def _reports_loss(config: DictConfig) -> bool:
    """Whether the stage's objective is its loss (rlhf_exp/sweeps/figures.py)."""
    stage = OmegaConf.select(config, "stage")
    return stage == "sft" or (stage == "rft" and OmegaConf.select(config, "rft.rounds") == 1)


def _directions(objectives: Sequence[str], given: Any, loss: bool) -> list[str]:
    from hydra_plugins.rlhf_optuna import _outcome

    if not objectives or len(set(objectives)) < len(objectives):
        raise InputError(f"hydra.sweeper.objectives: name each once, got [{', '.join(objectives)}]")
    if given is None:
        return [WAYS[loss if name == _outcome.OBJECTIVE else _outcome.minimised(name)] for name in objectives]
    found = [str(one).lower() for one in (given if isinstance(given, list | tuple) else [given])]
    if set(found) - set(WAYS):
        raise InputError(f"hydra.sweeper.direction must be maximize or minimize, got {given}")
    if len(found) != len(objectives):
        raise InputError(
            f"hydra.sweeper.direction has {len(found)}, hydra.sweeper.objectives {len(objectives)}: one for each"
        )
    return found


def _runs(batch: Sequence[Asked]) -> list[list[Asked]]:
    """The batch in parts whose numbers follow each other."""
    parts = [[batch[0]]]
    for before, asked in pairwise(batch):
        if asked.number == before.number + 1:
            parts[-1].append(asked)
        else:
            parts.append([asked])
    return parts
