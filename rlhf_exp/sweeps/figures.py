"""What a sweep compares: which of a run's metrics is its objective, its gold score, its KL.

rft measures answers before it trains on them: the figures of its first round are those of the policy that it was
given, the same in every trial. So they count from the second round on, and with rft.rounds=1 the loss is what is
left; stage=eval on top measures the policy itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_exp.store.runs import RunFolder

# the first of these that a stage reports
OBJECTIVES = (
    "last/gold",
    "last/reward",
    "objective/gold",
    "objective/scores",
    "eval/best_reward",
    "validation/accuracy",
    "train/loss",
)
GOLD = ("last/gold", "objective/gold", "final/gold")
KL = ("last/kl", "objective/kl", "final/kl")
RUNNING = ("objective/gold", "objective/scores", "train/loss")  # the first that a step has
ROUND, ROUNDS = "rft/round", ("rft/gold", "rft/score")
STOPPED_BY = "stopped_by"  # of run.json: the guard that ended it


class Figures(NamedTuple):
    """Of a run. metric: what the objective is; stopped_by: the guard that ended it."""

    metric: str | None = None
    gold: float | None = None
    kl: float | None = None
    stopped_by: str = ""


def objective(metrics: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """(name, value) of a finished run's objective; Nones if it reports none."""
    names = (*ROUNDS, *OBJECTIVES) if metrics.get(ROUND, 1) > 1 else OBJECTIVES
    return _first(names, metrics)


def running(rounds: int = 1) -> tuple[str, ...]:
    """The metrics of which the first that a step has is the value of the running trial; rounds: of rft."""
    return ROUNDS if rounds > 1 else RUNNING


def of(run: Path) -> Figures:
    """What its run folder says; nothing if it cannot be read, which has been said elsewhere."""
    try:
        record = RunFolder(run).read()
    except Exception:
        return Figures()
    metrics = record.get("metrics") or {}
    gold = (ROUNDS[0], *GOLD) if metrics.get(ROUND, 1) > 1 else GOLD
    name, _ = objective(metrics)
    return Figures(name, _first(gold, metrics)[1], _first(KL, metrics)[1], str(record.get(STOPPED_BY) or ""))


def _first(names: tuple[str, ...], metrics: Mapping[str, Any]) -> tuple[str | None, float | None]:
    name = next((name for name in names if metrics.get(name) is not None), None)
    return name, None if name is None else metrics[name]
