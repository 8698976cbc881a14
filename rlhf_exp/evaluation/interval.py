"""How sure a mean is: standard errors, and intervals for the difference of two policies."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# fewest prompts that get an interval: without any effect, all of n differences have one sign with chance 2 / 2^n, and
# then every resample has it too; that is below 5 % from 6 on (2 / 64), not yet at 5 (2 / 32)
LEAST = 6
_CELLS = 1 << 20  # resampled values held at once


class Estimate(NamedTuple):
    mean: float
    se: float  # standard error of the mean


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def mean_se(values: Sequence[float]) -> Estimate:
    """Mean and its standard error s / sqrt(n), s with n - 1 in the denominator.

    One value has no standard error (nan), no value has no mean (nan); a nan among the values makes both nan.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return Estimate(math.nan, math.nan)
    se = x.std(ddof=1) / math.sqrt(x.size) if x.size > 1 else math.nan
    return Estimate(float(x.mean()), float(se))


def grouped_mean_se(values: Sequence[float], groups: Sequence[Hashable]) -> Estimate:
    """Mean of all values, and its standard error where those of one group are not independent.

    groups[i] is the group (the prompt) of values[i]. sqrt(G / (G - 1) sum_g d_g^2) / n, where d_g is the sum of
    (value - mean) over a group, G the number of groups and n that of values (Liang & Zeger 1986, the robust
    variance, for a mean). Groups of one size: the standard error of their means; of one value each: `mean_se`. One
    group has none (nan). Raises ValueError for lists of different lengths.
    """
    if len(values) != len(groups):
        raise ValueError(f"each value has a group, got {len(values)} values and {len(groups)} groups")
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return Estimate(math.nan, math.nan)
    mean = float(x.mean())
    sums: dict[Hashable, float] = {}
    for group, deviation in zip(groups, (x - mean).tolist(), strict=True):
        sums[group] = sums.get(group, 0.0) + deviation
    count = len(sums)
    if count == 1:
        return Estimate(mean, math.nan)
    spread = sum(total * total for total in sums.values())
    return Estimate(mean, math.sqrt(count / (count - 1) * spread) / x.size)


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    least: int = LEAST,
) -> Interval:
    """Mean of after - before, with the percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    before[i] and after[i] are scores on the same prompt; prompts are what is resampled, so that easy and hard
    ones cancel. groups[i] is the prompt, where several are of one: then it comes with all of its own, or not at all.
    The same seed gives the same interval. Fewer than `least` prompts give no interval (nan), nor do scores with a
    nan. Raises ValueError for no pairs, or lists of different lengths.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"pairs need as many scores before as after, got {len(before)} and {len(after)}")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean = float(difference.mean())
    totals, counts = _by_group(difference, range(difference.size) if groups is None else groups)
    n = totals.size
    if n < max(least, 2) or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    rows = max(1, _CELLS // n)
    means = []
    for done in range(0, draws, rows):
        drawn = generator.integers(n, size=(min(rows, draws - done), n))
        means.append(totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _by_group(values: np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, in order of their coming."""
    places: dict[Hashable, int] = {}
    index = [places.setdefault(group, len(places)) for group in groups]
    if len(index) != values.size:
        raise ValueError(f"each value has a group, got {values.size} values and {len(index)} groups")
    return np.bincount(index, weights=values), np.bincount(index)


def gains(
    baseline: Mapping[str, Sequence[float]], policy: Mapping[str, Sequence[float]], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """For each score that both have (name -> one value a prompt): policy minus baseline, 95 % interval.

    The form of a policy's optional "gain" in eval.json: {"gold": {"mean": .., "low": .., "high": ..}, ..}.
    """
    return {
        name: paired_bootstrap(baseline[name], values, seed=seed)._asdict()
        for name, values in policy.items()
        if name in baseline
    }
