"""A launcher whose trials are a function, and a sweeper on it: all of the study, none of Hydra's composing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.rlhf_optuna.config import PRUNERS, SAMPLERS, OptunaConf
from hydra_plugins.rlhf_optuna.sweeper import OptunaSweeper
from omegaconf import OmegaConf, open_dict

from rlhf_exp.sweeps import current, ledger


@dataclass
class Launcher:
    """function(number, params, folder): the fields of the ledger's `ended`; an exception is a failed trial."""

    function: Callable[[int, dict[str, Any], Path], dict[str, Any]]
    sweep: Path
    at_once: int = 1
    launched: list[tuple[int, list[list[str]]]] = field(default_factory=list)

    def launch(self, job_overrides: Any, initial_job_idx: int) -> list[JobReturn]:
        self.launched.append((initial_job_idx, [list(lines) for lines in job_overrides]))
        return [self._run(number, list(lines)) for number, lines in enumerate(job_overrides, initial_job_idx)]

    def _run(self, number: int, overrides: list[str]) -> JobReturn:
        folder = self.sweep / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        ledger.append(self.sweep, ledger.TRIAL, number=number, overrides=overrides)
        ledger.append(self.sweep, ledger.STARTED, number=number)
        try:
            with current.inside(current.Trial(folder, number, overrides)):
                end = {"status": ledger.DONE} | self.function(number, params(overrides), folder)
        except Exception as error:
            end = {"status": ledger.FAILED, "reason": str(error)}
        ledger.append(self.sweep, ledger.ENDED, number=number, **end)
        failed = end["status"] == ledger.FAILED
        value = RuntimeError(end["reason"]) if failed else end.get("objective")
        return JobReturn(
            overrides=overrides,
            status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
            _return_value=value,
        )


def params(overrides: list[str]) -> dict[str, Any]:
    """key -> value, numbers as numbers."""
    return {line.partition("=")[0]: OmegaConf.create(f"v: {line.partition('=')[2]}").v for line in overrides}


def sweeper(
    sweep: Path,
    function: Any,
    *,
    sampler: str = "tpe",
    pruner: str = "none",
    stage: str = "ppo",
    **settings: Any,
) -> OptunaSweeper:
    """hydra/sweeper=optuna as Hydra makes it. Settings with a dot are keys of the sampler or pruner."""
    conf = OmegaConf.structured(OptunaConf)
    with open_dict(conf):
        conf.sampler, conf.pruner = SAMPLERS[sampler](), PRUNERS[pruner]()
        for key in ("_target_", "_recursive_", "defaults"):
            conf.pop(key)
    for key, value in settings.items():
        OmegaConf.update(conf, key, value)
    made = OptunaSweeper(**{str(key): conf[key] for key in conf})
    made.config = OmegaConf.create({"stage": stage, "hydra": {"sweep": {"dir": str(sweep)}}})
    made.hydra_context = SimpleNamespace(config_loader=None)
    made.launcher = Launcher(function, sweep)
    return made


XY = ["stage=ppo", "x=interval(-2, 2)", "y=interval(-2, 2)"]


def bowl(number, params, folder):
    """Best at (1, -0.5)."""
    return {"objective": -((params["x"] - 1) ** 2) - (params["y"] + 0.5) ** 2}


def stored(sweep):
    """The trials in the database, read as anybody would."""
    storage = f"sqlite:///{sweep / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials()


def points(sweep):
    return [(trial.number, trial.params, trial.values, trial.state) for trial in stored(sweep)]


def run(sweep, function=bowl, words=XY, **settings):
    made = sweeper(sweep, function, **settings)
    made.sweep(list(words))
    return made
