"""The best trials: printed, and as optimization_results.yaml in the form of Hydra's own plugin, with numbers."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import optuna
from hydra_plugins.rlhf_optuna._study import Study
from optuna.trial import FrozenTrial, TrialState

from rlhf_exp.store import atomic

FILE = "optimization_results.yaml"
SHOWN = 5  # the best of one objective
NAMES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}


def write(study: Study) -> None:
    """best_params and best_value, or the solutions of a Pareto front; nothing before a trial is complete."""
    best = study.best()
    if not best:
        return
    import yaml

    content: dict[str, Any] = {"name": "optuna"}
    if len(study.objectives) == 1:
        first = best[0]
        content |= {"best_params": dict(first.params), "best_value": first.value}
        content["best_trial"] = study.number(first)
    else:
        content["objectives"] = study.objectives
        content["solutions"] = [
            {"params": dict(one.params), "values": list(one.values), "trial": study.number(one)}
            for one in best
        ]
    atomic.write_bytes(
        study.sweep / FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
    )


def lines(study: Study) -> list[str]:
    """What is printed at the end."""
    trials, best = study.trials(), study.best()
    counts = Counter(NAMES.get(one.state, "unfinished") for one in trials)
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    ways = [direction.name.lower() + "d" for direction in study.study.directions]
    goals = ", ".join(f"{name} {way}" for name, way in zip(study.objectives, ways, strict=True))
    head = f"{len(trials)} trials ({said}); {goals}"
    if not best:
        return [head]
    single = len(study.objectives) == 1
    shown = best[:SHOWN] if single else best
    title = f"the best {len(shown)}" if single else f"the Pareto front, {len(shown)} of them"
    found = [f"{head}; {title}:", *table(study, shown)]
    if single and (weights := importances(study)):
        found.append("importance: " + ", ".join(f"{key} {value:.2f}" for key, value in weights.items()))
    return found


def table(study: Study, trials: list[FrozenTrial]) -> list[str]:
    """A row for each: number, objectives, parameters."""
    keys = list(study.space.searched)
    rows = [["trial", *study.objectives, *keys]]
    for one in trials:
        values = [*one.values, *(one.params.get(key) for key in keys)]
        rows.append([str(study.number(one)), *map(_text, values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]


def importances(study: Study) -> dict[str, float]:
    """The share of each key in how good the trials are (PED-ANOVA, Watanabe et al. 2023); {} from few trials."""
    if len(study.space.searched) < 2 or len(study.trials(TrialState.COMPLETE)) < 10:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study.study, evaluator=evaluator)
        except (ValueError, RuntimeError, ImportError):  # nothing varies
            return {}
    return found if all(map(math.isfinite, found.values())) else {}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
