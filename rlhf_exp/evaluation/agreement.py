"""How far two labellers order the same pairs alike: share with its interval, and Cohen's kappa."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rlhf_exp.evaluation.share import share_of


class Agreement(NamedTuple):
    """pairs: those that both order; share of them that they order alike, its 95 % interval; Cohen's kappa."""

    pairs: int
    share: float
    low: float
    high: float
    kappa: float


def agreement(one: Sequence[int], two: Sequence[int], prompts: Sequence[int]) -> Agreement:
    """Of two labellers' orders of the same pairs: 1 the first answer is better, -1 the second, 0 no verdict.

    Pairs that one of them does not order are left out. The interval knows that pairs of one prompt are not
    independent (share.py).
    kappa (Cohen 1960, eq. 1): (share - chance) / (1 - chance), chance from how often each prefers the first answer;
    nan where chance is 1. All are nan for no pairs.
    """
    both = [(a, b, prompt) for a, b, prompt in zip(one, two, prompts, strict=True) if a and b]
    n = len(both)
    if not n:
        return Agreement(0, *[math.nan] * 4)
    share, low, high = share_of([float(a == b) for a, b, _ in both], [prompt for *_, prompt in both])
    first, second = (sum(row[side] > 0 for row in both) / n for side in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    kappa = (share - chance) / (1 - chance) if chance < 1 else math.nan
    return Agreement(n, share, low, high, kappa)
