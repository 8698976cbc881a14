"""The launcher that Hydra calls: trials are frozen into their folders, run by the pool, and read off the ledger."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf_exp.errors import InputError

if TYPE_CHECKING:
    from hydra_plugins.rlhf_local_pool._pool import Job
    from hydra_plugins.rlhf_local_pool._share import Share
    from hydra_plugins.rlhf_local_pool._view import View

    from rlhf_exp.sweeps.ledger import State


class TrialFailed(RuntimeError):
    """How a trial's process ended; the traceback is in its log."""

    def __str__(self) -> str:
        return self.args[0]


class LocalPool(Launcher):
    """The arguments are the keys of config.LocalPoolConf."""

    def __init__(
        self,
        workers: int | None = None,
        devices_per_trial: int = 1,
        devices: Sequence[str] | None = None,
        threads: int | None = None,
        env: dict[str, str] | None = None,
        grace_seconds: float = 600.0,
    ):
        self.workers, self.devices_per_trial, self.threads = workers, devices_per_trial, threads
        self.devices = None if devices is None else [str(one) for one in devices]
        self.env = {str(name): str(value) for name, value in (env or {}).items()}
        self.grace_seconds = grace_seconds
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises InputError for settings that cannot be."""
        from hydra_plugins.rlhf_local_pool import _share

        wrong = _share.problems(self.devices_per_trial, self.workers, self.threads, self.devices or ())
        wrong = wrong or _share.absent(self.devices or ())
        if self.grace_seconds < 0:
            wrong.append(f"hydra.launcher.grace_seconds must be at least 0, got {self.grace_seconds}")
        if wrong:
            raise InputError(wrong)
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    @property
    def at_once(self) -> int:
        """Trials that run at a time if there are enough of them; a sweeper asks for as many."""
        return len(self._shares([self.config], 10**6))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the trials initial_job_idx and on; returns how each ended, in their order."""
        from hydra_plugins.rlhf_local_pool._pool import Pool
        from hydra_plugins.rlhf_local_pool._view import View

        setup_globals()
        sweep = Path(str(self.config.hydra.sweep.dir)).absolute()
        sweep.mkdir(parents=True, exist_ok=True)
        results: dict[int, JobReturn] = {}
        jobs, configs = [], []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            results[number] = JobReturn(overrides=list(overrides))
            job = self._freeze(sweep, number, list(overrides), results[number])
            if job is not None:
                jobs.append(job)
                configs.append(results[number].cfg)
        if jobs:
            _name_varying(jobs)
            shares = self._shares(configs, len(jobs))
            with View(len(jobs)) as view:
                pool = Pool(shares, view, environment=self.env, grace=self.grace_seconds)
                pool.run(jobs, lambda job, code: _ended(view, job, results[job.number], code))
        return list(results.values())

    def _freeze(self, sweep: Path, number: int, overrides: list[str], result: JobReturn) -> Job | None:
        """Compose and write a trial; None, and the result, if it cannot be run or has been."""
        from hydra_plugins.rlhf_local_pool._pool import Job

        from rlhf_exp import compose
        from rlhf_exp.sweeps import ledger, trial

        folder = sweep / str(number)
        try:
            with compose.explained():
                config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
                with open_dict(config):
                    config.hydra.job.id = config.hydra.job.num = number
                    config.hydra.runtime.output_dir = str(folder)
            result.hydra_cfg = OmegaConf.create({"hydra": config.hydra})
            result.cfg = compose.without_hydra(config)
            trial.write(folder, number, overrides, config, compose.choices_of(config.hydra))
            compose.to_run(config)
        except InputError as error:
            if number not in ledger.states(sweep):
                ledger.append(sweep, ledger.TRIAL, number=number, overrides=overrides)
            said = "; ".join(error.problems)
            ledger.append(
                sweep, ledger.ENDED, number=number, status=ledger.FAILED, reason=said, bad_input=True
            )
            result.status, result.return_value = JobStatus.FAILED, error
            return None
        state = ledger.states(sweep)[number]
        if state.settled:
            print(f"trial {number}: {state.status} before, not run again", flush=True)
            _fill(result, state, 0)
            return None
        return Job(number, overrides, folder)

    def _shares(self, configs: Sequence[DictConfig], jobs: int) -> list[Share]:
        from hydra_plugins.rlhf_local_pool import _share

        wanted = [int(OmegaConf.select(config, "threads") or 0) for config in configs]
        devices = self.devices
        if devices is None:
            on_cpu = all(OmegaConf.select(config, "device") == "cpu" for config in configs)
            devices = [] if on_cpu else _share.devices()
        return _share.deal(
            jobs,
            devices=devices,
            per_trial=self.devices_per_trial,
            workers=self.workers,
            threads=self.threads or max(wanted),
            cores=_share.cores(),
        )


def _name_varying(jobs: Sequence[Job]) -> None:
    """For the screen: the overrides that not all trials have."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    for job in jobs:
        job.varying = " ".join(line for line in job.overrides if line not in common)


def _fill(result: JobReturn, state: State, code: int) -> None:
    """The ledger's word as Hydra wants it; a trial that was stopped early has no value."""
    from rlhf_exp.sweeps import ledger

    result.working_dir, result.task_name = os.getcwd(), "rlhf_exp"
    if state.settled:
        result.status = JobStatus.COMPLETED
        result.return_value = state.end.get("objective") if state.status == ledger.DONE else None
        return
    reason = state.reason or f"its process ended with exit code {code}"
    error: Exception = InputError(reason.split("; ")) if state.end.get("bad_input") else TrialFailed(reason)
    result.status, result.return_value = JobStatus.FAILED, error


def _ended(view: View, job: Job, result: JobReturn, code: int) -> None:
    from rlhf_exp.sweeps import ledger

    state = ledger.states(job.folder.parent)[job.number]
    _fill(result, state, code)
    view.ended(job.number, state.status, _figures(state), failed=result.status == JobStatus.FAILED)


def _figures(state: State) -> str:
    """What is worth a line: the objective, or why there is none."""
    if state.status != "done":
        return f": {state.reason}" if state.reason else ""
    figures: list[tuple[str, Any]] = [(name, state.end.get(name)) for name in ("objective", "gold", "kl")]
    said = [f"{name} {value:.4g}" for name, value in figures if isinstance(value, int | float)]
    return f": {', '.join(said)}" if said else ""
