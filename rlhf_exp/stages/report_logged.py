"""Trials of runs that only MLflow still has: figures from their metrics, evaluations from their eval.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_exp.evaluation.trials import (
    EVAL,
    EVALUATION,
    HELDOUT,
    LOGGED,
    TRAINING,
    Evaluated,
    Row,
    Trial,
    apart,
    by_run,
    parsed,
    rows_of_curve,
)
from rlhf_exp.schema import RLOO
from rlhf_exp.store.runs import FAILED
from rlhf_exp.tracking.experiments import Experiment, Logged

PARENT = "mlflow.parentRunId"


def trials(experiment: Experiment, runs: Sequence[Logged]) -> list[Trial]:
    """An evaluation's policies go to the trainings of the same parent, by their role; else they stand alone."""
    trained = {run.run_id: _trial(experiment, run) for run in runs if run.stage != EVAL}
    found = list(trained.values())
    for run in (run for run in runs if run.stage == EVAL):
        parent = run.tags.get(PARENT)
        beside = [
            trained[r.run_id] for r in runs if r.stage != EVAL and parent and r.tags.get(PARENT) == parent
        ]
        evaluated = _evaluated(experiment, run)
        # its own parents are not in MLflow: those that it names, else the only one there is
        roles = set(evaluated.roles.values()) - {"sft"} or {trial.stage for trial in beside}
        parts = by_run(evaluated, {role: role for role in sorted(roles)})
        for who, part in parts.items():
            own = None if who in evaluated.apart else _of_role(evaluated.roles.get(who, who), beside)
            if own is None:
                own = _trial(experiment, run)
                if len(parts) > 1 or len(roles) > 1 or who in evaluated.apart:
                    apart(own, who)
                found.append(own)
            own.rows[HELDOUT] = part.rows
            own.evaluation = dict(run.params)
            own.digest += _digest([(row.name, row.metrics) for row in part.rows])
    return found


def _of_role(role: str, trained: Sequence[Trial]) -> Trial | None:
    """The only training of a role; rloo is of stage ppo too."""
    same = [trial for trial in trained if trial.stage == ("ppo" if role == RLOO else role)]
    if len(same) > 1:
        same = [trial for trial in same if (trial.config.get("ppo.estimator") == RLOO) == (role == RLOO)]
    return same[0] if len(same) == 1 else None


def _evaluated(experiment: Experiment, run: Logged) -> Evaluated:
    """From its eval.json; where that is not there, from its metrics, which name no policy."""
    text = experiment.text(run, EVALUATION)
    try:
        return parsed(json.loads(text or ""), 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        rows = [_row(line) for line in experiment.history(run, run.metrics)]
        rows = [row for row in rows if "kl" in row.metrics]
        return Evaluated(rows, [], ["" if row.is_start else "policies" for row in rows], {}, frozenset())


def _trial(experiment: Experiment, run: Logged) -> Trial:
    key = run.tags.get("key", run.run_id)
    name = f"{run.stage}/{key[:12]}"
    reason = run.tags.get("rlhf_exp.error", "MLflow has its traceback") if run.status == FAILED else ""
    found = Trial(name, run.stage, key, run.status, f"MLflow run {run.run_id}", reason, dict(run.params))
    found.run_name = run.params.get("run_name")
    if run.stage != EVAL:
        curve = experiment.history(run, [m for m in run.metrics if not m.startswith("final/")])
        found.rows[TRAINING] = rows_of_curve(curve, run.stage)
        found.digest = _digest(curve)
    return found


def _row(line: Mapping[str, float]) -> Row:
    """A line of an evaluation's metrics: a policy, whose step is policy_step; 0 is the start only at a KL of 0."""
    metrics = {
        name: value for name, value in line.items() if name not in ("step", "policy_step", *LOGGED.values())
    }
    step = line.get("policy_step")
    if step == 0:
        return Row("sft", 0, metrics) if metrics.get("kl") == 0 else Row("policy", None, metrics)
    return Row("policy" if step is None else f"step {step:g}", step, metrics)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
