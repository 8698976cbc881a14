"""From trials to what a report shows: for each source and each objective the lines, Pareto set, best, fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf_exp.evaluation.comparison import Group
from rlhf_exp.evaluation.frontier import (
    Band,
    Fit,
    Point,
    bands,
    best_under,
    finite,
    fit,
    pareto,
    thinned,
)
from rlhf_exp.evaluation.trials import HELDOUT, TRAINING, Trial
from rlhf_exp.schema import Report

SOURCES = (HELDOUT, TRAINING)
LABELS = {"gold": "Gold score", "reward": "Reward", "win_rate": "Win rate"}


class Spot(NamedTuple):
    """A point that can be chosen: whose, and whether it is a mean over seeds."""

    point: Point
    line: int  # index of its line
    seeds: int


@dataclass
class Line:
    """One group in one picture: what each of its trials measured, and what is drawn of it."""

    group: Group
    index: int  # of the group, for its colour
    members: list[tuple[Trial, list[Point]]]  # each trial's finite points, by step
    bands: list[Band]  # where there are several seeds
    fit: Fit | str

    @property
    def paths(self) -> list[list[Point]]:
        """What is joined by lines: the means over the seeds; where no step is shared, each trial by itself.

        By step; averages over steps are on no line.
        """
        if self.bands:
            return [[Point(b.kl, b.score, b.step, said(b), bound=b.bound) for b in self.bands]]
        return [[p for p in points if p.step is not None] for _, points in self.members]

    @property
    def spots(self) -> list[Spot]:
        """What a person may choose: the line's points, and averages, which no step had."""
        seeds = len(self.members)
        if self.bands:
            return [Spot(p, self.index, seeds) for p in self.paths[0]]
        return [Spot(p, self.index, 1) for _, points in self.members for p in points]

    @property
    def unfinished(self) -> bool:
        return any(trial.state != "FINISHED" for trial, _ in self.members)


@dataclass
class Picture:
    """One objective against KL from one source."""

    source: str
    objective: str
    lines: list[Line]
    pareto: list[Spot] = field(default_factory=list)
    best: list[tuple[float, Spot | None]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return LABELS.get(self.objective, self.objective)


def said(band: Band) -> str:
    """What the mean of several seeds' policies is called: by its step, or by the name where that is no step's."""
    return f"step {band.step:g}" if band.step == 0 or "@" in band.name else band.name or f"step {band.step:g}"


def pictures(groups: Sequence[Group], report: Report) -> list[Picture]:
    """Every picture that has a point: held-out first, then training; objectives in the config's order."""
    found = []
    for source in SOURCES:
        for objective in report.objectives:
            lines = [_line(group, i, source, objective, report) for i, group in enumerate(groups)]
            lines = [line for line in lines if line.members]
            if not lines:
                continue
            spots = _spots(lines)
            chosen = {id(p): s for s in spots for p in [s.point]}
            kept = [chosen[id(p)] for p in pareto(s.point for s in spots)]
            best = []
            for limit in report.kl_limits:
                point = best_under((s.point for s in spots), limit)
                best.append((limit, chosen[id(point)] if point is not None else None))
            found.append(Picture(source, objective, lines, kept, best))
    return found


def _spots(lines: Sequence[Line]) -> list[Spot]:
    """Of all lines; the start, which trials share, once."""
    found: dict[object, Spot] = {}
    for spot in (spot for line in lines for spot in line.spots):
        shared = spot.point.step == 0 and spot.point.kl == 0
        found.setdefault(("start", spot.point.score) if shared else id(spot.point), spot)
    return list(found.values())


def _line(group: Group, index: int, source: str, objective: str, report: Report) -> Line:
    members = [(trial, points_of(trial, source, objective, report)) for trial in group.trials]
    members = [(trial, points) for trial, points in members if points]
    runs = [points for _, points in members]
    # best-of-n has a law of its own (Gao et al. 2022)
    best_of_n = any(p.bound for run in runs for p in run) and report.fit != "none"
    form = "bon" if best_of_n else report.fit
    return Line(group, index, members, bands(runs, report.band), fitted(runs, form))


def points_of(trial: Trial, source: str, objective: str, report: Report) -> list[Point]:
    """A trial's points: a policy each, or a few steps of the training curve each."""
    if trial.lost:
        return []
    found = []
    for row in trial.rows.get(source, []):
        kl, score = row.metrics.get(report.kl), row.metrics.get(objective)
        if kl is not None and score is not None:
            error = row.metrics.get(f"{objective}_se")
            bound = row.bound and report.kl == "kl"
            found.append(Point(kl, score, row.step, row.name, error, bound))
    return thinned(found, report.points) if source == TRAINING else finite(found)


def fitted(runs: Sequence[Sequence[Point]], form: str) -> Fit | str:
    """The law over the seeds of a group together, each counted from its own start where that was measured.

    The start is the policy of step 0 at a KL of 0, which an evaluation has and a training curve has not: its first
    batch is one noisy sample of it, so that the score at KL 0 is fitted instead.
    """
    if form == "none":
        return "no law was asked for (report.fit=none)"
    starts = [next((p.score for p in run if p.step == 0 and p.kl == 0), None) for run in runs]
    if not runs or None in starts:
        return fit([point for run in runs for point in run], form)
    mean = math.fsum(starts) / len(starts)
    pairs = zip(runs, starts, strict=True)
    shifted = [p._replace(score=p.score - start + mean) for run, start in pairs for p in run]
    return fit(shifted, form, mean)
