"""Win rates by hand, the bootstrap in closed form, and what must hold whatever the outcomes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_exp.evaluation.interval import paired_bootstrap
from rlhf_exp.evaluation.wins import by_score, win_rate

scores = st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * 2), min_size=6, max_size=30)


def test_a_higher_score_wins_and_equal_ones_tie():
    assert by_score([1.0, 2.0, -1.0, 0.0], [0.0, 2.0, 3.0, -0.0]) == [1.0, 0.5, 0.0, 0.5]


def test_by_hand():
    """Wins 1, 1, 0 and a tie: 2.5 of 4; standard error s / sqrt(4), s^2 = (.375^2 * 2 + .625^2 + .125^2) / 3."""
    found = win_rate([1.0, 1.0, 0.0, 0.5])
    assert found.mean == 0.625
    assert found.ties == 0.25
    assert found.se == pytest.approx(math.sqrt((2 * 0.375**2 + 0.625**2 + 0.125**2) / 3) / 2)


def test_the_interval_of_six_prompts_in_closed_form():
    """Half won: a resample's wins are binomial; P(0) = 1/64 = 1.6 %, P(at most 1) = 7/64: 1 is the 2.5 % point."""
    assert win_rate([1.0, 0.0] * 3)[2:4] == pytest.approx((1 / 6, 5 / 6))


def test_the_bootstrap_of_three_prompts_in_closed_form():
    """One of three lost: 3, 2, 1, 0 wins have chances 8, 12, 6, 1 in 27; 2.5 % are below 1 win (1 in 27 = 3.7 %)."""
    whole = paired_bootstrap([0.0] * 3, [1.0, 1.0, 0.0], least=3)
    assert whole == pytest.approx((2 / 3, 0.0, 1.0))
    narrow = paired_bootstrap(
        [0.0] * 3, [1.0, 1.0, 0.0], level=0.9, least=3
    )  # 5 %: above 1/27 and below 7/27
    assert (narrow.low, narrow.high) == pytest.approx((1 / 3, 1.0))


def test_answers_to_one_prompt_are_not_independent():
    """Answers to six prompts, four each, all won to three and all lost to three, are as sure as six answers."""
    outcomes = ([1.0] * 4 + [0.0] * 4) * 3
    found = win_rate(outcomes, 4)
    assert found[:4] == win_rate([1.0, 0.0] * 3)[:4]
    assert found.mean == 0.5 and found.ties == 0  # no tie: each answer won or lost
    single = win_rate(outcomes)
    assert single.high - single.low < found.high - found.low


def test_all_won_is_not_certain():
    """Wilson 1927 of n of n: the lower end is n / (n + z^2), z = 1.96; of answers to one prompt n is the prompts."""
    z2 = 1.959964**2
    for found in (win_rate([1.0] * 8), win_rate([1.0] * 32, 4)):
        assert found[2:4] == pytest.approx((8 / (8 + z2), 1), abs=1e-6)
    assert win_rate([0.0] * 8)[2:4] == pytest.approx((0, z2 / (8 + z2)), abs=1e-6)


def test_few_prompts_have_no_interval_and_one_no_error():
    """Five of a fair coin are all alike with chance 2/32 = 6.2 %, six with 2/64 = 3.1 %."""
    assert all(map(math.isnan, win_rate([1.0, 0.0, 1.0, 0.0, 0.5])[2:4]))
    assert not any(map(math.isnan, win_rate([1.0, 0.0, 1.0, 0.0, 0.5, 1.0])[1:4]))
    found = win_rate([1.0, 0.5], 2)
    assert found.mean == 0.75 and all(map(math.isnan, found[1:4]))


@given(scores)
def test_the_opponent_has_the_rest(pairs):
    ours, theirs = zip(*pairs, strict=True)
    forth, back = win_rate(by_score(ours, theirs)), win_rate(by_score(theirs, ours))
    assert forth.mean == pytest.approx(1 - back.mean, abs=1e-12)
    assert (forth.low, forth.high) == pytest.approx((1 - back.high, 1 - back.low), abs=1e-12)
    assert forth.ties == back.ties


@given(scores)
def test_a_policy_against_itself_is_exactly_one_half(pairs):
    ours = [pair[0] for pair in pairs]
    assert win_rate(by_score(ours, ours))[:4] == (0.5, 0.0, 0.5, 0.5)


@given(scores)
def test_only_the_order_of_scores_counts(pairs):
    ours, theirs = zip(*pairs, strict=True)
    stretched = [[math.exp(x) for x in row] for row in (ours, theirs)]
    assert win_rate(by_score(ours, theirs)) == win_rate(by_score(*stretched))
    found = win_rate(by_score(ours, theirs))
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(("outcomes", "samples"), [([], 1), ([1.0, 0.0, 1.0], 2)])
def test_outcomes_must_be_whole_prompts(outcomes, samples):
    with pytest.raises(ValueError, match="outcomes are no"):
        win_rate(outcomes, samples)


def test_scores_must_be_pairs():
    with pytest.raises(ValueError):
        by_score([1.0], [1.0, 2.0])
