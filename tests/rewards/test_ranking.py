"""From scores and verdicts to pairs, by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_exp.rewards.ranking import (
    FEW,
    LOW,
    NEAR,
    NO_VERDICT,
    NOT_BEST,
    TIE,
    Pick,
    best,
    by_scores,
    by_verdicts,
    orders,
    picks,
)

SCORES = by_scores([1.0, 3.0, 2.0, 3.0])
# answers 0, 1, 2: 0 beats 1 at .8; 0 against 2 changes with the order; 2 beats 1 at .7
VERDICTS = by_verdicts(3, [0.8, 0.45, 0.3], [True, False, True])


def test_the_best_and_the_worst_the_first_of_equal_ones():
    assert picks(SCORES, "best_worst", 0, dropped := Counter()) == [Pick(1, 0, 2.0)]
    assert picks(by_scores([2.0, 1.0, 3.0, 1.0, 3.0]), "best_worst", 0, dropped) == [Pick(2, 1, 2.0)]
    assert not dropped


def test_all_pairs_but_ties():
    found = picks(SCORES, "all", 0, dropped := Counter())
    assert found == [Pick(1, 0, 2.0), Pick(2, 0, 1.0), Pick(3, 0, 2.0), Pick(1, 2, 1.0), Pick(3, 2, 1.0)]
    assert dropped == {TIE: 1}


def test_a_margin_at_the_bound_is_kept_and_one_below_is_not():
    assert len(picks(SCORES, "all", 1.0, Counter())) == 5
    assert picks(SCORES, "all", 1.01, dropped := Counter()) == [Pick(1, 0, 2.0), Pick(3, 0, 2.0)]
    assert dropped == {TIE: 1, NEAR: 3}
    assert picks(SCORES, "best_worst", 2.5, dropped := Counter()) == []
    assert dropped == {NEAR: 1}


def test_equal_scores_are_a_tie_whatever_is_asked_for():
    assert picks(by_scores([2.0, 2.0]), "best_worst", 0, dropped := Counter()) == []
    assert dropped == {TIE: 1}


def test_one_answer_compares_with_nothing():
    for pairs in ("best_worst", "all"):
        assert picks([[0.0]], pairs, 0, dropped := Counter()) == []
        assert dropped == {FEW: 1}


def test_verdicts_are_margins_of_chances_and_none_where_the_order_decides():
    assert VERDICTS[0][1] == pytest.approx(0.6) and VERDICTS[1][0] == pytest.approx(-0.6)
    assert VERDICTS[0][2] is None and VERDICTS[2][0] is None
    assert VERDICTS[1][2] == pytest.approx(-0.4) and VERDICTS[2][1] == pytest.approx(0.4)


def test_a_judges_best_and_worst_are_those_with_the_most_and_least_of_all_margins():
    """Sums .6, -1 and .4: answer 0 against answer 1."""
    ((better, worse, margin),) = picks(VERDICTS, "best_worst", 0, Counter())
    assert (better, worse) == (0, 1) and margin == pytest.approx(0.6)


def test_a_pair_without_a_verdict_is_left_out_and_counted():
    found = picks(VERDICTS, "all", 0, dropped := Counter())
    assert [(pick.better, pick.worse) for pick in found] == [(0, 1), (2, 1)]
    assert dropped == {NO_VERDICT: 1}


def test_orders_are_signs_of_the_pairs_in_turn():
    assert orders(SCORES) == [-1, -1, -1, 1, 0, -1]
    assert orders(VERDICTS) == [1, 0, -1]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_stops(wrong):
    with pytest.raises(FloatingPointError, match="nan or inf"):
        by_scores([1.0, wrong])


# ---------------------------------------------------------------- the best of n


def test_the_best_first_and_of_equal_ones_the_first():
    scores = [1.0, 3.0, 2.0, 3.0]
    assert best(scores, range(4), 1, None, dropped := Counter()) == [1]
    assert dropped == {NOT_BEST: 3}
    assert best(scores, range(4), 3, None, dropped := Counter()) == [1, 3, 2]
    assert best(scores, range(4), 0, None, dropped := Counter()) == [1, 3, 2, 0]
    assert not dropped


def test_only_given_places_and_only_scores_that_reach_the_threshold():
    assert best([9.0, 1.0, 2.0], [1, 2], 1, 2.0, dropped := Counter()) == [2]
    assert dropped == {LOW: 1}
    assert best([9.0, 1.0, 2.0], [1, 2], 1, 2.5, dropped := Counter()) == []
    assert dropped == {LOW: 2}


def test_a_score_that_is_no_number_cannot_be_the_best():
    with pytest.raises(FloatingPointError, match="nan or inf"):
        best([1.0, float("nan")], [0], 1, None, Counter())
