"""Agreement by hand: share, Cohen's kappa, an interval that knows prompts."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.evaluation.agreement import agreement


def test_by_hand():
    """Five pairs that both order, three alike; each prefers the first answer in three: chance .6 .6 + .4 .4 = .52."""
    found = agreement([1, 1, 1, -1, -1, 0], [1, 1, -1, -1, 1, 1], range(6))
    assert found.pairs == 5
    assert found.share == pytest.approx(0.6)
    assert found.kappa == pytest.approx(0.08 / 0.48)
    # Wilson's interval of 3 of 5 (R: prop.test(3, 5, correct=FALSE))
    assert (found.low, found.high) == pytest.approx((0.2307, 0.8824), abs=1e-4)


def test_pairs_of_one_prompt_that_go_together_count_as_one():
    """Ten pairs of one prompt alike, ten of another not: Wilson's interval of 1 of 2, not of 10 of 20."""
    found = agreement([1] * 20, [1] * 10 + [-1] * 10, [0] * 10 + [1] * 10)
    assert found.share == 0.5
    assert (found.low, found.high) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_opposite_labellers_have_kappa_minus_one():
    assert agreement([1, -1, 1, -1], [-1, 1, -1, 1], range(4)).kappa == pytest.approx(-1)


def test_no_pair_and_no_chance_to_differ():
    nothing = agreement([1, 0], [0, -1], range(2))
    assert nothing.pairs == 0 and math.isnan(nothing.share) and math.isnan(nothing.kappa)
    always = agreement([1, 1], [1, 1], range(2))
    assert (always.share, always.high) == (1, 1) and math.isnan(always.kappa)
    assert always.low == pytest.approx(0.3424, abs=1e-4)  # Wilson's of 2 of 2
