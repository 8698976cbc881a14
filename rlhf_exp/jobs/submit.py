"""Brings trials to SLURM: upstream jobs first, then arrays of trials that ask for the same and wait for the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from rlhf_exp.errors import InputError
from rlhf_exp.jobs import graph as graphs
from rlhf_exp.jobs import script, units
from rlhf_exp.jobs.graph import Graph
from rlhf_exp.jobs.script import BLOCK, Job
from rlhf_exp.jobs.settings import Settings, resources_of
from rlhf_exp.sweeps import ledger


def submit(sweep: Path, graph: Graph, settings: Settings, numbers: Iterable[int]) -> list[str]:
    """Submit these trials and what they wait for, and enter it in the ledger; returns the jobs' ids.

    An upstream job that waits or runs already is waited for, one that has ended well is not submitted again. When
    SLURM refuses one, what was submitted is cancelled and InputError says why.
    """
    submitted: list[str] = []
    known = units.read(sweep)
    ids: dict[str, str | None] = {}  # of upstream jobs; None: made already
    numbers = sorted(numbers)
    try:
        for name in graphs.needed(graph, numbers):
            unit = known.get(name)
            if unit is not None and unit.done:
                ids[name] = None
                continue
            if unit is not None and unit.open:
                ids[name] = unit.job
                continue
            wanted = graph.upstream[name]
            after = tuple(ids[parent] for parent in wanted.after if ids.get(parent))
            ids[name] = script.submit(Job(wanted.stage, name, after=after), sweep, settings)
            submitted.append(ids[name])
            ledger.append(sweep, ledger.SUBMITTED, upstream=name, stage=wanted.stage, job=ids[name])
        for job in arrays(graph, settings, numbers, ids):
            array = script.submit(job, sweep, settings)
            submitted.append(array)
            trials = [
                {
                    "number": number,
                    "stage": job.stage,
                    "job": f"{array}_{number - job.offset}",
                    "after": [name for name in graph.after[number] if ids.get(name)],
                }
                for number in job.numbers
            ]
            ledger.append_all(sweep, ledger.SUBMITTED, trials)  # in one write: its trials may run already
    except InputError:
        if submitted:
            cancel(submitted)
        raise
    return submitted


def arrays(graph: Graph, settings: Settings, numbers: Iterable[int], ids: dict[str, str | None]) -> list[Job]:
    """Trials together that ask for the same resources and wait for the same jobs."""
    found: dict[tuple, list[int]] = {}
    for number in numbers:
        stage = graph.stages[number]
        after = tuple(ids[name] for name in graph.after[number] if ids.get(name))
        key = (stage, repr(resources_of(settings, stage)), after, number // BLOCK)
        found.setdefault(key, []).append(number)
    return [Job(stage, None, tuple(group), after) for (stage, _, after, _), group in found.items()]


def texts(sweep: Path, graph: Graph, settings: Settings, numbers: Iterable[int]) -> list[str]:
    """The scripts that `submit` would send, with names in the place of ids that nobody has yet."""
    numbers = sorted(numbers)
    names = graphs.needed(graph, numbers)
    jobs = [Job(graph.upstream[name].stage, name, after=tuple(graph.upstream[name].after)) for name in names]
    jobs += arrays(graph, settings, numbers, {name: name for name in names})
    return [script.text(job, sweep, settings) for job in jobs]


def cancel(jobs: Iterable[str]) -> str:
    """End jobs, waiting or running; returns what scancel has to say. One that has ended is no error."""
    try:
        done = subprocess.run(
            ["scancel", "--quiet", *jobs], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scancel: {error}"
    return done.stderr.strip()
