"""How sure a share is (an accuracy, an agreement) where several pairs are of one prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from rlhf_exp.algorithms.pairwise import wilson_interval
from rlhf_exp.evaluation.interval import grouped_mean_se


class Share(NamedTuple):
    """The mean of values from 0 to 1, with its 95 % interval."""

    mean: float
    low: float
    high: float


def share_of(values: Sequence[float], groups: Sequence[Hashable]) -> Share:
    """values: 0, 1, or 0.5 for a tie; groups[i] is the group (the prompt) of values[i].

    Values of one group are not independent: the interval is Wilson's for as many independent values as would give
    the standard error that the groups have (Liang & Zeger 1986; Kish 1965, the effective sample size n / deff), at
    least one a group and no more than there are; where no value tells (all alike), one a group. Raises ValueError
    for no values, or lists of different lengths.
    """
    if not values:
        raise ValueError("a share needs values")
    mean, se = grouped_mean_se(values, groups)
    independent = float(len(set(groups)))
    if se > 0 and 0 < mean < 1:
        independent = min(float(len(values)), max(independent, mean * (1 - mean) / se**2))
    return Share(mean, *wilson_interval(mean * independent, independent))
