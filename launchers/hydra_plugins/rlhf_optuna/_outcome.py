"""What became of a trial, in optuna's terms: its state and the values of the objectives.

The sweep's ledger says it, whatever launcher ran the trial. Where there is none (a task that is not ours), the job's
return value does: a number, or a sequence of one for each objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from optuna.trial import TrialState

from rlhf_exp.store.runs import RunFolder
from rlhf_exp.sweeps import ledger

OBJECTIVE = "objective"
OF_THE_LEDGER = (OBJECTIVE, "gold", "kl")
LESS_IS_BETTER = ("kl", "loss", "ece", "perplexity")


@dataclass
class Verdict:
    """state None: it is not over; the trial is run again when the sweep is resumed."""

    state: TrialState | None
    values: list[float] | None = None
    reason: str = ""
    metric: str | None = None  # what `objective` was


def minimised(name: str) -> bool:
    """Whether less of a metric is better, by its name."""
    return name.rpartition("/")[2] in LESS_IS_BETTER


def of_ledger(sweep: Path, number: int, objectives: Sequence[str]) -> Verdict | None:
    """What the ledger says of a trial; None: nothing."""
    state = ledger.states(sweep).get(number)
    if state is None or not state.attempts:
        return None
    if state.status == ledger.DONE:
        return _done(state.end, objectives)
    if state.status == ledger.STOPPED:
        return Verdict(TrialState.PRUNED, reason=state.reason)
    if state.status == ledger.FAILED:
        return Verdict(TrialState.FAIL, reason=state.reason)
    return Verdict(None, reason=state.reason or state.status)


def _done(end: dict[str, Any], objectives: Sequence[str]) -> Verdict:
    found, metrics = [], None
    for name in objectives:
        value = end.get(name) if name in OF_THE_LEDGER else None
        if value is None and name != OBJECTIVE:
            metrics = _metrics(end.get("run")) if metrics is None else metrics
            value = metrics.get(name)
        if not _is_number(value):
            known = f"; it has {', '.join(sorted(metrics))}" if metrics else ""
            return Verdict(TrialState.FAIL, reason=f"reports no {name}{known}")
        found.append(float(value))
    return Verdict(TrialState.COMPLETE, found, metric=end.get("metric"))


def _metrics(run: str | None) -> dict[str, Any]:
    if run is None:
        return {}
    with suppress(Exception):  # gone or damaged: the trial reports nothing
        return dict(RunFolder(Path(run)).read().get("metrics") or {})
    return {}


def of_job(job: JobReturn, objectives: Sequence[str]) -> Verdict:
    """What a launcher returned for the trial."""
    if job.status != JobStatus.COMPLETED:
        error: Any = "the launcher reports no result"
        if job.status == JobStatus.FAILED:
            try:
                _ = job.return_value  # read, so that whoever collects failures hears of it
                error = job._return_value
            except Exception as raised:
                error = raised
        return Verdict(TrialState.FAIL, reason=str(error).partition("\n")[0])
    value = job.return_value
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) != len(objectives) or not all(map(_is_number, values)):
        return Verdict(TrialState.FAIL, reason=f"returns {value!r}, not {' and '.join(objectives)}")
    return Verdict(TrialState.COMPLETE, [float(one) for one in values])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def of(sweep: Path, number: int, job: JobReturn, objectives: Sequence[str]) -> Verdict:
    """The ledger's verdict if it has one, else the job's; a failed job is read in any case."""
    said = of_job(job, objectives)
    return of_ledger(sweep, number, objectives) or said
