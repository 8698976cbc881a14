"""What `inputs` of stage=report names: run folders on this disk, or the runs of an MLflow experiment.

A text is, in this order: a run folder; a folder below which run folders are, or the lists that the trials of a sweep
leave (sweeps/current.py); the name of an MLflow experiment, which `mlflow:` before it says outright.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf_exp.errors import InputError
from rlhf_exp.evaluation.trials import NO_POLICY, Trial
from rlhf_exp.schema import ReportRun
from rlhf_exp.stages import report_logged
from rlhf_exp.store.listing import Entry, entry, is_run_folder
from rlhf_exp.store.manifest import RECORD
from rlhf_exp.sweeps import current
from rlhf_exp.tracking.experiments import Experiment, Logged, open_experiment, where

EXPERIMENT = "mlflow:"
NOT_OURS = ("mlartifacts", "mlruns")  # copies of what run folders hold


class Found(NamedTuple):
    """Run folders, trials that only MLflow still has, and what to be told of."""

    entries: list[Entry]
    trials: list[Trial]
    notes: list[str]


def find(config: ReportRun) -> Found:
    """Everything that `inputs` names, each run once. Raises InputError, a line for each text that names nothing."""
    given = config.inputs if isinstance(config.inputs, list) else [config.inputs]
    entries: dict[str, Entry] = {}
    trials: dict[str, Trial] = {}
    notes: list[str] = []
    problems: list[str] = []
    for text in map(str, given):
        try:
            found = _one(text.strip(), config)
        except InputError as error:
            problems += error.problems
            continue
        entries |= {os.path.realpath(e.path): e for e in found.entries}
        trials |= {t.path: t for t in found.trials}
        notes += found.notes
    if problems:
        raise InputError(problems)
    return Found(sorted(entries.values(), key=_when), list(trials.values()), notes)


def _when(e: Entry) -> tuple[str, str]:
    return str(e.record.get("started") or ""), e.path.name


def _one(text: str, config: ReportRun) -> Found:
    path = Path(text)
    if not text.startswith(EXPERIMENT):
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"inputs={text}: the folder cannot be read: permission denied")
        if path.is_file():
            raise InputError(f"inputs={text} is a file: set inputs to a folder with run folders")
        if (path / RECORD).is_file():
            return Found([entry(path)], [], [])
        if path.is_dir():
            return _folder(path)
    name, output = text.removeprefix(EXPERIMENT), Path(config.output_dir)
    experiment = open_experiment(name, config.tracking, output)
    if experiment is None:
        store = where(config.tracking, output)
        there = "" if text.startswith(EXPERIMENT) else f"there is no folder {path}, and "
        raise InputError(
            f"inputs={text}: {there}no MLflow experiment {name} in {store}; set inputs to a folder with run folders, "
            "or tracking.uri to where the experiment is"
        )
    return _experiment(name, experiment)


def _folder(path: Path) -> Found:
    """The run folders below a folder; of a sweep's folder those that its trials list."""
    entries, lost = [entry(run) for run in _runs_below(path)], []
    for file in sorted(path.rglob(current.RUNS)):
        for run in current.noted(file):
            if run.is_dir():
                entries.append(entry(run))
            else:
                lost.append(f"{file.relative_to(path)} names {run}, which is not there.")
    if not entries:
        gone = f" ({lost[0]})" if lost else ""
        sweep = (path / "multirun.yaml").is_file() and not lost
        hint = "; the runs of this sweep are in its output_dir" if sweep else ""
        raise InputError(f"inputs={path}: there are no run folders in it{gone}{hint}")
    return Found(entries, [], lost)


def _runs_below(path: Path) -> Iterator[Path]:
    """Run folders at any depth, not those within a run, nor hidden or MLflow's."""
    for parent, folders, _ in os.walk(path):
        here = [name for name in sorted(folders) if name[0] != "." and name not in NOT_OURS]
        runs = [name for name in here if is_run_folder(Path(parent) / name)]
        yield from (Path(parent) / name for name in runs)
        folders[:] = [name for name in here if name not in runs]


def _experiment(name: str, experiment: Experiment) -> Found:
    """The run folders that an experiment's runs name, and trials made of the logs of those that are elsewhere."""
    entries: dict[str, Entry] = {}
    absent: list[Logged] = []
    for run in experiment.runs:
        if run.stage in NO_POLICY or not run.stage:
            continue
        if run.folder and (Path(run.folder) / RECORD).is_file():
            entries[run.folder] = entry(Path(run.folder))
        else:
            absent.append(run)
    if not entries and not absent:
        raise InputError(
            f"inputs={name}: the MLflow experiment has no run that trained or evaluated a policy"
        )
    notes = []
    if absent:
        notes.append(
            f"{len(absent)} runs of the experiment {name} have no folder on this machine: their figures are those "
            "that MLflow has, and there are no samples of them."
        )
    return Found(list(entries.values()), report_logged.trials(experiment, absent), notes)
