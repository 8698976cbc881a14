"""Hydra's side: composes the trials, hands them to rlhf_exp.jobs, and says how each ended.

Nothing that runs on a node lives here: Hydra's scanner may execute a plugin's module twice.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from rlhf_exp.jobs.graph import Graph
    from rlhf_exp.jobs.settings import Settings
    from rlhf_exp.jobs.units import Unit
    from rlhf_exp.jobs.watch import Row

VALUES = "basic"  # the sweeper that does without the trials' values


class SlurmLauncher(Launcher):
    """Trials as arrays of jobs; the stages that they stand on as jobs of their own, which they wait for."""

    def __init__(self, **values: Any):
        self.values = values

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises InputError for settings that cannot be."""
        from omegaconf import OmegaConf

        from rlhf_exp.errors import InputError
        from rlhf_exp.jobs import settings

        self.hydra_context, self.config = hydra_context, config
        plain = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in self.values.items()
        }
        self.settings = settings.settings_of(plain)
        problems = settings.problems(self.settings)
        sweeper = config.hydra.runtime.choices.get("hydra/sweeper")
        given = ["wait=false"] * (not self.settings.wait) + ["dry_run=true"] * self.settings.dry_run
        problems += [
            f"hydra/sweeper={sweeper} chooses trials by the values of those before and has to wait for them: leave "
            f"out hydra.launcher.{name}"
            for name in given
            if sweeper != VALUES
        ]
        problems += _ranks(self.settings, config)
        if problems:
            raise InputError(problems)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, and with wait=true look until all have ended."""
        from rlhf_exp.errors import Interrupted
        from rlhf_exp.jobs import graph as graphs
        from rlhf_exp.jobs import submit, watch

        sweep = Path(str(self.config.hydra.sweep.dir))
        graph, _ = graphs.read(sweep) or (graphs.Graph(), None)
        returns = {
            number: self.planned(number, overrides, sweep, graph)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        }
        sound = [number for number, job in returns.items() if job.status == JobStatus.UNKNOWN]
        if self.settings.dry_run:
            say("\n\n".join(submit.texts(sweep, graph, self.settings, sound)))
            return _without_values(returns)
        graphs.write(sweep, graph, self.settings)
        known = {row.unit.number: row.unit for row in look(sweep)}
        todo = [number for number in sound if not (known[number].done or known[number].open)]
        if todo:
            jobs = submit.submit(sweep, graph, self.settings, todo)
            say(f"{len(todo)} trials submitted as {', '.join(jobs)}; python -m rlhf_exp.jobs status {sweep}")
        if not self.settings.wait:
            return _without_values(returns)
        try:
            found = watch.wait(sweep, sound, self.settings.poll_s, say)
        except (KeyboardInterrupt, Interrupted):
            say(f"the jobs go on; python -m rlhf_exp.jobs status|cancel {sweep}")
            raise
        for number, unit in found.items():
            _tell(returns[number], unit)
        return list(returns.values())

    def planned(self, number: int, overrides: Sequence[str], sweep: Path, graph: Graph) -> JobReturn:
        """Compose a trial, freeze it, and enter its jobs in the graph; what is wrong with it fails this one alone."""
        from rlhf_exp import compose
        from rlhf_exp.errors import InputError
        from rlhf_exp.jobs import graph as graphs
        from rlhf_exp.sweeps import ledger, trial

        job = JobReturn(overrides=list(filter_overrides(overrides)))
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            run, choices = compose.to_run(composed), compose.choices_of(composed.hydra)
            if not self.settings.dry_run:
                trial.write(sweep / str(number), number, list(composed.hydra.overrides.task), run, choices)
            graphs.add(graph, number, run, choices)
        except InputError as error:
            job.status, job.return_value = JobStatus.FAILED, error
            if not self.settings.dry_run:
                said = "; ".join(error.problems)
                ledger.append(
                    sweep, ledger.ENDED, number=number, status=ledger.FAILED, reason=said, bad_input=True
                )
        return job


def _ranks(given: Settings, config: DictConfig) -> list[str]:
    """What the strategy says to the processes of the command's own stage, and of those whose resources are named."""
    from rlhf_exp import compose
    from rlhf_exp.jobs import settings
    from rlhf_exp.strategies import require

    run = compose.to_run(config, across=False)
    if not hasattr(run, "strategy"):
        return []
    # what is said to DeepSpeed is about the own stage's batches
    plain = replace(run, strategy=replace(run.strategy, deepspeed={}))
    named = [name for name in settings.STAGES if getattr(given.by_stage, name) != settings.Resources()]
    return [
        f"hydra.launcher: {stage}: {line}"
        for stage in dict.fromkeys([run.stage, *named])
        for line in require.config_problems(
            run if stage == run.stage else plain, settings.ranks_of(given, stage)
        )
    ]


def _tell(job: JobReturn, unit: Unit) -> None:
    """What became of a trial, in Hydra's words."""
    from rlhf_exp.errors import InputError
    from rlhf_exp.sweeps import ledger

    if unit.done:
        job.status = JobStatus.COMPLETED
        job.return_value = unit.end.get("objective") if unit.status == ledger.DONE else None
        return
    error = InputError(unit.reason) if unit.end.get("bad_input") else RuntimeError(unit.reason or unit.status)
    job.status, job.return_value = JobStatus.FAILED, error


def look(sweep: Path) -> list[Row]:
    """How the trials of an earlier command stand."""
    from rlhf_exp.errors import InputError
    from rlhf_exp.jobs import watch
    from rlhf_exp.jobs.states import NoAnswer

    try:
        return watch.look(sweep)
    except NoAnswer as error:
        raise InputError(f"SLURM does not answer, so it is not known what waits or runs: {error}") from error


def _without_values(jobs: dict[int, JobReturn]) -> list[JobReturn]:
    """For a sweeper that does not ask: no trial has a value yet."""
    for job in jobs.values():
        if job.status == JobStatus.UNKNOWN:
            job.status, job.return_value = JobStatus.COMPLETED, None
    return list(jobs.values())


def say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
