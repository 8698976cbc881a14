"""Standard errors and bootstrap intervals against hand numbers, brute force and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.evaluation import interval


def test_standard_error_by_hand():
    # deviations -2 0 2: s = sqrt(8 / 2) = 2, se = 2 / sqrt(3)
    assert interval.mean_se([1, 3, 5]) == pytest.approx((3, 2 / math.sqrt(3)))


def test_standard_error_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, size=50)
    assert interval.mean_se(values) == pytest.approx((values.mean(), stats.sem(values)))


def test_what_cannot_be_known_is_nan():
    assert interval.mean_se([2.0]).mean == 2.0
    assert math.isnan(interval.mean_se([2.0]).se)
    assert all(map(math.isnan, interval.mean_se([])))
    assert all(map(math.isnan, interval.mean_se([1.0, math.nan])))


def test_grouped_errors_by_hand():
    # mean 3; deviations -2 -2 | 1 | 3 sum to -4, 1, 3 by group: sqrt(3 / 2 * 26) / 4
    found = interval.grouped_mean_se([1, 4, 1, 6], ["a", "b", "a", "c"])
    assert found == pytest.approx((3, math.sqrt(39) / 4))


def test_grouped_errors_are_those_of_the_means_where_groups_are_alike():
    values = np.random.default_rng(1).normal(size=(20, 5)) + np.random.default_rng(2).normal(size=(20, 1))
    groups = [row for row in range(20) for _ in range(5)]
    means = values.mean(axis=1)
    assert interval.grouped_mean_se(values.ravel(), groups) == pytest.approx((means.mean(), stats.sem(means)))
    alone = interval.grouped_mean_se(values.ravel(), range(100))
    assert alone == pytest.approx((values.mean(), stats.sem(values.ravel())))


def test_grouped_errors_that_cannot_be_known():
    one = interval.grouped_mean_se([1.0, 3.0], ["a", "a"])
    assert one.mean == 2.0 and math.isnan(one.se)
    assert all(map(math.isnan, interval.grouped_mean_se([], [])))
    with pytest.raises(ValueError, match="3 values and 1 groups"):
        interval.grouped_mean_se([1, 2, 3], ["a"])


@pytest.mark.parametrize("level", [0.4, 0.8, 0.95])
def test_interval_by_brute_force(level):
    """Three pairs have 27 equally likely resamples, which can be listed."""
    before, after = [0.0, 1.0, 5.0], [1.0, 1.0, 11.0]
    means = sorted(sum(draw) / 3 for draw in itertools.product([1, 0, 6], repeat=3))
    found = interval.paired_bootstrap(before, after, level=level, draws=40_000, least=3)
    low, high = (np.quantile(means, q, method="inverted_cdf") for q in ((1 - level) / 2, (1 + level) / 2))
    assert found == pytest.approx((7 / 3, low, high))


def test_pairing_cancels_what_is_common():
    """Prompts differ a lot, the gain on each is exactly 0.5."""
    before = np.random.default_rng(1).normal(0, 100, size=40)
    assert interval.paired_bootstrap(before, before + 0.5) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_is_scipys():
    generator = np.random.default_rng(2)
    before, after = generator.normal(size=(2, 60))
    oracle = stats.bootstrap(
        (after - before,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(3)
    ).confidence_interval
    found = interval.paired_bootstrap(before, after)
    assert found.low == pytest.approx(oracle.low, abs=0.02)
    assert found.high == pytest.approx(oracle.high, abs=0.02)


def test_seeded_and_signed():
    before, after = np.random.default_rng(4).normal(size=(2, 30))
    first = interval.paired_bootstrap(before, after, seed=1)
    assert first == interval.paired_bootstrap(before, after, seed=1)
    assert first != interval.paired_bootstrap(before, after, seed=2)
    assert interval.paired_bootstrap([1.0, 2.0], [4.0, 5.0]).mean == 3.0  # after - before


def test_large_sets_are_resampled_in_parts(monkeypatch):
    before, after = np.random.default_rng(5).normal(size=(2, 30))
    whole = interval.paired_bootstrap(before, after, draws=1_000)
    monkeypatch.setattr(interval, "_CELLS", 7 * 30)
    assert interval.paired_bootstrap(before, after, draws=1_000) == pytest.approx(whole, abs=0.05)


def test_degenerate_pairs():
    one = interval.paired_bootstrap([1.0], [3.0], least=1)
    assert one.mean == 2.0 and math.isnan(one.low) and math.isnan(one.high)
    five = interval.paired_bootstrap(
        [0.0] * 5, [0.1, 0.2, 0.1, 0.3, 0.2]
    )  # five rises are chance in 2 of 32 cases
    assert five.mean == pytest.approx(0.18) and math.isnan(five.low) and math.isnan(five.high)
    assert interval.paired_bootstrap([0.0] * 6, [0.1, 0.2, 0.1, 0.3, 0.2, 0.1]).low > 0
    assert all(map(math.isnan, interval.paired_bootstrap([1.0, math.nan], [1.0, 2.0])))
    for before, after in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="as many scores before as after"):
            interval.paired_bootstrap(before, after)


def test_a_prompt_comes_with_all_of_its_pairs_or_not_at_all():
    """Prompt a has two pairs of +1, b one of -2: the four resamples have means 1, 0, 0 and -2 (of all pairs)."""
    given = ([0.0] * 3, [1.0, -2.0, 1.0], ["a", "b", "a"])
    found = interval.paired_bootstrap(*given, level=0.4, least=2)
    assert found == (0.0, 0.0, 0.0)  # 30 % and 70 % points of -2 (1/4), 0 (1/2), 1 (1/4)
    wide = interval.paired_bootstrap(*given, least=2)
    assert (wide.low, wide.high) == (-2.0, 1.0)
    whole = [float(x) for x in range(8)]
    twice = interval.paired_bootstrap([0.0] * 16, whole * 2, [*range(8)] * 2)
    assert twice == pytest.approx(interval.paired_bootstrap([0.0] * 8, whole))  # copies tell nothing
    assert math.isnan(
        interval.paired_bootstrap([0.0] * 16, whole * 2, [0, 1, 2, 3, 4] * 3 + [0]).low
    )  # 5 prompts
    with pytest.raises(ValueError, match="3 values and 1 groups"):
        interval.paired_bootstrap(*given[:2], ["a"])


def test_gains_of_what_both_have():
    scores = {"gold": [0.0, 1.0] * 3, "other": [1.0] * 6}, {"gold": [1.0, 2.0] * 3, "reward": [1.0, 2.0] * 3}
    found = interval.gains(*scores)
    assert found == {"gold": {"mean": 1.0, "low": 1.0, "high": 1.0}}
