"""From what a labeller says of a prompt's answers to the pairs that are kept; from their scores to the best of them.

A labeller's word on k answers is a table of margins [k][k]: how much better answer i is than answer j, the negative
of the same of j and i; None where it has no verdict (a judge whose winner changes with the order). Scores give
differences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

Margins = list[list[float | None]]

BEST_WORST = "best_worst"  # of prefer.pairs
TIE, NO_VERDICT, NEAR = "ties", "verdict changed with the order", "margin below prefer.min_margin"
FEW = "prompts with fewer than two different answers"
LOW, NOT_BEST = "score below the threshold", "not among the best"


class Pick(NamedTuple):
    """A pair: places of the better and the worse answer, and the margin between them, above 0."""

    better: int
    worse: int
    margin: float


def by_scores(scores: Sequence[float]) -> Margins:
    """Margins that are differences of scores. FloatingPointError for a score that is not finite."""
    if not all(math.isfinite(score) for score in scores):
        raise FloatingPointError(f"the labeller's scores hold nan or inf: {list(scores)}")
    return [[a - b for b in scores] for a in scores]


def by_verdicts(count: int, chances: Sequence[float], consistent: Sequence[bool]) -> Margins:
    """Margins P(i better) - P(j better) = 2 P - 1 of a judge's verdicts on the pairs i < j of `count` answers.

    chances: P(i is better), the mean over both orders (Lee et al. 2023); consistent: whether the same
    answer wins in both. Pairs are in the order of `combinations`.
    """
    margins: Margins = [[0.0] * count for _ in range(count)]
    for (i, j), p, same in zip(combinations(range(count), 2), chances, consistent, strict=True):
        margin = 2 * p - 1 if same else None
        margins[i][j], margins[j][i] = margin, None if margin is None else -margin
    return margins


def picks(margins: Margins, pairs: str, least: float, dropped: Counter[str]) -> list[Pick]:
    """The pairs to keep; what is left out is counted in `dropped` by reason.

    best_worst: of the answers with the largest and the smallest sum of margins (of scores: the best and the worst; of
    a judge: Borda's count by chances), the first of equal ones. least: smaller margins are left out, 0 always.
    """
    count = len(margins)
    if count < 2:
        dropped[FEW] += 1
        return []
    places = list(combinations(range(count), 2))
    if pairs == BEST_WORST:
        totals = [math.fsum(margin for margin in row if margin is not None) for row in margins]
        # of equal sums the first, of the worst too; where all are, nobody is best
        places = [(totals.index(max(totals)), totals.index(min(totals)))]
    found = []
    for i, j in places:
        margin = margins[i][j]
        if margin is None:
            dropped[NO_VERDICT] += 1
        elif margin == 0:
            dropped[TIE] += 1
        elif abs(margin) < least:
            dropped[NEAR] += 1
        else:
            found.append(Pick(i, j, margin) if margin > 0 else Pick(j, i, -margin))
    return found


def orders(margins: Margins) -> list[int]:
    """For each pair i < j: 1 where i is better, -1 where j is, 0 where there is no verdict."""
    upper = (margins[i][j] or 0.0 for i, j in combinations(range(len(margins)), 2))
    return [(value > 0) - (value < 0) for value in upper]


def best(
    scores: Sequence[float], places: Sequence[int], most: int, least: float | None, dropped: Counter[str]
) -> list[int]:
    """Of `places`, those of the `most` highest scores, best first, the first of equal ones; 0: all.

    Best-of-n (Stiennon et al. 2020) for most=1. least: lower scores do not count. What is left out is counted in
    `dropped` by reason. FloatingPointError for a score that is not finite.
    """
    if not all(math.isfinite(score) for score in scores):
        raise FloatingPointError(f"the scores hold nan or inf: {list(scores)}")
    enough = [i for i in places if least is None or scores[i] >= least]
    kept = sorted(enough, key=lambda i: (-scores[i], i))[: most or None]
    for reason, count in ((LOW, len(places) - len(enough)), (NOT_BEST, len(enough) - len(kept))):
        if count:
            dropped[reason] += count
    return kept
