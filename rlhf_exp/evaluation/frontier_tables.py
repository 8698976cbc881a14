"""The figures of a frontier report as tables: rows of {column: value}, for the page and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_exp.evaluation.comparison import ABSENT, SEED, Group, differences, written
from rlhf_exp.evaluation.frontier import Fit
from rlhf_exp.evaluation.frontier_lines import SOURCES, Picture, Spot
from rlhf_exp.evaluation.trials import Trial

Table = list[dict[str, Any]]
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a text becomes a formula in a spreadsheet


def tables(
    groups: Sequence[Group], pictures: Sequence[Picture], objectives: Sequence[str]
) -> dict[str, Table]:
    """Every table by its name; one without rows is left out."""
    found = {
        "trials": trials(groups, objectives),
        "config": config(groups),
        "points": points(pictures),
        "bands": bands(pictures),
        "pareto": pareto(pictures),
        "best": best(pictures),
        "fits": fits(pictures),
    }
    return {name: rows for name, rows in found.items() if rows}


def trials(groups: Sequence[Group], objectives: Sequence[str]) -> Table:
    """A row for each run: how it ended, and the figures of its last policy."""
    rows = []
    for group in groups:
        for trial in group.trials:
            row = {
                "group": group.label,
                "run": trial.name,
                "state": trial.state,
                "seed": trial.config.get("seed"),
                "model": trial.task[0],
                "dataset": trial.task[1],
            }
            for source in SOURCES:
                row |= _last(trial, source, objectives)
            rows.append(row | {"reason": trial.reason, "path": trial.path})
    return rows


def _last(trial: Trial, source: str, objectives: Sequence[str]) -> dict[str, Any]:
    last = trial.last(source)
    figures = {f"{source}_step": last.step if last else None}
    return figures | {
        f"{source}_{name}": last.metrics.get(name) if last else None for name in ("kl", *objectives)
    }


def config(groups: Sequence[Group]) -> Table:
    """A row for each run, a column for each setting that differs between them; the seed is in the table of trials."""
    every = [(group, trial) for group in groups for trial in group.trials]
    known = [pair for pair in every if pair[1].config]
    table = differences([trial for _, trial in known])
    keys = [key for key in table if not SEED.fullmatch(key)]
    if not keys:
        return []
    return [
        {"group": group.label, "run": trial.name}
        | {key: "" if table[key][i] is ABSENT else written(table[key][i]) for key in keys}
        for i, (group, trial) in enumerate(known)
    ]


def points(pictures: Sequence[Picture]) -> Table:
    """Every point of every trial."""
    return [
        {
            "source": picture.source,
            "objective": picture.objective,
            "group": line.group.label,
            "run": trial.name,
            "seed": trial.config.get("seed"),
            "policy": point.name,
            "step": point.step,
            "kl": point.kl,
            "kl_is": "bound" if point.bound else "measured",
            "score": point.score,
            "se": point.se,
        }
        for picture in pictures
        for line in picture.lines
        for trial, found in line.members
        for point in found
    ]


def bands(pictures: Sequence[Picture]) -> Table:
    """Means over seeds and from where to where they go."""
    return [
        {
            "source": picture.source,
            "objective": picture.objective,
            "group": line.group.label,
            **band._asdict(),
        }
        for picture in pictures
        for line in picture.lines
        for band in line.bands
    ]


def pareto(pictures: Sequence[Picture]) -> Table:
    """The policies that none dominates, by KL."""
    return [
        {"source": picture.source, "objective": picture.objective} | _chosen(picture, spot)
        for picture in pictures
        for spot in picture.pareto
    ]


def best(pictures: Sequence[Picture]) -> Table:
    """The best policy under each limit; empty cells where there is none."""
    return [
        {"source": picture.source, "objective": picture.objective, "kl_limit": limit} | _chosen(picture, spot)
        for picture in pictures
        for limit, spot in picture.best
    ]


def _chosen(picture: Picture, spot: Spot | None) -> dict[str, Any]:
    if spot is None:
        return dict.fromkeys(("group", "policy", "step", "kl", "kl_is", "score", "se", "seeds"))
    label = next(line.group.label for line in picture.lines if line.index == spot.line)
    point = spot.point
    start = point.step == 0 and point.kl == 0
    return {
        "group": "" if start else label,  # the trials share it
        "policy": point.name,
        "step": point.step,
        "kl": point.kl,
        "kl_is": "bound" if point.bound else "measured",
        "score": point.score,
        "se": point.se,
        "seeds": spot.seeds,
    }


def fits(pictures: Sequence[Picture]) -> Table:
    """The law of each line, its peak, or why there is none."""
    rows = []
    for picture in pictures:
        for line in picture.lines:
            row = {"source": picture.source, "objective": picture.objective, "group": line.group.label}
            law = line.fit
            if isinstance(law, Fit):
                kl, score = law.peak
                most = max(p.kl for _, found in line.members for p in found)
                beyond = f"beyond the highest KL, {most:.3g}" if kl > most else ""
                row |= {
                    name: getattr(law, name) for name in ("form", "alpha", "beta", "start", "r2", "points")
                }
                row |= {"peak_d": math.sqrt(kl), "peak_kl": kl, "peak_score": score, "note": beyond}
            else:
                row |= dict.fromkeys(("form", "alpha", "beta", "start", "r2", "points"))
                row |= dict.fromkeys(("peak_d", "peak_kl", "peak_score")) | {"note": law}
            rows.append(row)
    return rows


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """A table as CSV with a line of names; nothing is an empty cell, a text never a formula of a spreadsheet."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in table)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
