"""Win rates: how often one policy's answer is better than another's, to the same prompt with the same noise.

The share of wins, a tie counting half, so that two policies of which neither is better have .5. Prompts are what is
resampled for the interval: several answers to one prompt are not independent. Where all prompts are alike there is
nothing to resample, and the interval is Wilson's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rlhf_exp.algorithms.pairwise import wilson_interval
from rlhf_exp.evaluation import interval


class WinRate(NamedTuple):
    """A win rate over answers, with its standard error and 95 % interval.

    One prompt has no standard error, fewer than interval.LEAST have no interval (nan).
    """

    mean: float
    se: float
    low: float
    high: float
    ties: float  # share of answers


def by_score(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where our score is higher, 0 where it is lower, .5 where they are equal. ValueError for unequal lengths."""
    return [0.5 * ((a > b) - (a < b)) + 0.5 for a, b in zip(ours, theirs, strict=True)]


def win_rate(outcomes: Sequence[float], samples: int = 1, *, seed: int = 0) -> WinRate:
    """The win rate of outcomes 1, .5 or 0, of which `samples` to one prompt stand together.

    Percentile bootstrap over the prompts' means (interval.py): 1 - x for the opponent, its interval mirrored. Where
    all means are the same, and not because all are ties, its width would be 0: Wilson's interval for so many prompts.
    Raises ValueError for none, or for a number that `samples` does not divide.
    """
    if not outcomes or len(outcomes) % samples:
        raise ValueError(f"{len(outcomes)} outcomes are no {samples} for each of some prompts")
    means = [sum(outcomes[i : i + samples]) / samples for i in range(0, len(outcomes), samples)]
    found = interval.paired_bootstrap([0.5] * len(means), means, seed=seed)
    low, high = (0.5 + bound for bound in found[1:])
    if low == high and any(outcome != 0.5 for outcome in outcomes):
        low, high = wilson_interval(sum(means), len(means))
    ties = sum(outcome == 0.5 for outcome in outcomes) / len(outcomes)
    return WinRate(0.5 + found.mean, interval.mean_se(means).se, low, high, ties)
