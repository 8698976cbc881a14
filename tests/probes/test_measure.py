"""What is measured, with scorers whose preferences are known: every figure by hand."""

from __future__ import annotations

import json
import math

import pytest
from scipy.stats import binomtest, pearsonr

from rlhf_exp.errors import InputError
from rlhf_exp.probes import measure
from rlhf_exp.probes.answers import Probe


def longer_is_better(rows):
    """The number of the answer's tokens."""
    return [float(len(answer)) for _, answer in rows]


@pytest.fixture
def report(real):
    """Chosen 4, 3, 2 tokens; rejected 2, 4, 4: one pair of three in order."""
    probes = {
        "empty": [Probe(0, "", [2]), Probe(1, "", [2]), Probe(2, "", [2])],  # 1 token: never above
        "long": [Probe(0, "l0", [1] * 8), Probe(1, "l1", [1] * 9), Probe(2, "l2", [1] * 4)],  # always
        "short": [Probe(0, "s0", [7, 2]), Probe(2, "s2", [7, 7, 2])],  # 2 < 4, 3 > 2
        "echo": [Probe(1, "e1", [5, 5, 2])],  # a tie is not above
        "thanks": [],
    }
    same = [Probe(0, "w", [7, 8, 9, 2]), Probe(1, "w", [10, 10, 10, 11, 2]), Probe(2, "w", [13, 2])]
    return measure.measure(real, probes, longer_is_better, {"whitespace": (same, longer_is_better)})


def test_shares_with_their_intervals(report):
    expected = {"empty": (0, 3), "long": (3, 3), "short": (1, 2), "echo": (0, 1)}
    for kind, (above, n) in expected.items():
        found = report["kinds"][kind]
        assert (found["above"], found["n"], found["share"]) == (above, n, above / n)
        interval = binomtest(above, n).proportion_ci(0.95, method="wilson")
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_mean_shifts(report):
    """empty: 1 - 4, 1 - 3, 1 - 2; long: 4, 6, 2; short: -2, 1."""
    shifts = {kind: part["shift"] for kind, part in report["kinds"].items()}
    assert shifts == {"empty": -2.0, "long": 4.0, "short": -0.5, "echo": 0.0, "thanks": None}


def test_a_kind_that_could_not_be_made_has_no_share(report):
    found = report["kinds"]["thanks"]
    assert (found["n"], found["share"], found["low"], found["worst"]) == (0, None, None, [])


def test_the_worst_examples_come_first(report):
    worst = report["kinds"]["long"]["worst"]
    assert [(row["text"], row["score"], row["chosen_score"]) for row in worst] == [
        *(("l1", 9.0, 3.0), ("l0", 8.0, 4.0), ("l2", 4.0, 2.0)),
    ]
    assert worst[0] | {"id": 12, "prompt": "prompt 12", "chosen": "chosen 12"} == worst[0]


def test_only_three_examples_are_kept(real):
    many = {"long": [Probe(0, str(i), [1] * i) for i in range(1, 9)]}
    found = measure.measure(real, many, longer_is_better)["kinds"]["long"]
    assert [row["text"] for row in found["worst"]] == ["8", "7", "6"]
    assert (found["n"], found["above"]) == (8, 4)  # 5, 6, 7, 8 tokens against 4


def test_the_real_pairs(report):
    accuracy = report["accuracy"]
    assert (accuracy["share"], accuracy["n"]) == (1 / 3, 3)
    assert [(row["id"], row["chosen"], row["rejected"]) for row in report["real"]] == [
        *((11, 4.0, 2.0), (12, 3.0, 4.0), (13, 2.0, 4.0)),
    ]
    assert report["spread"] == 1.0  # of 4, 3, 2


def test_the_spread_of_equal_scores_is_0_exactly():
    assert measure.spread([0.1] * 3) == 0.0  # their rounded mean is not .1
    assert measure.spread([1.0]) is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(real, wrong):
    """One of seven; of what is scored once more, one of two."""

    def broken(rows):
        return [*longer_is_better(rows[:-1]), wrong]

    with pytest.raises(InputError) as error:
        measure.measure(real, {"empty": [Probe(2, "", [2])]}, broken)
    (line,) = error.value.problems
    assert line == (
        "the reward model's scores hold nan or inf (1 of 7 probed answers): give another adapters.reward, or train "
        "it with a lower optim.lr; if its weights are sound, set model.dtype=float32"
    )
    again = {"padding": ([Probe(0, "", [7]), Probe(1, "", [7])], broken)}
    with pytest.raises(InputError, match=r"nan or inf \(1 of 2 probed answers\)"):
        measure.measure(real, {}, longer_is_better, again)


def test_a_tie_of_a_real_pair_is_half_right():
    assert measure.accuracy([1.0, 2.0], [1.0, 3.0])["share"] == 0.25


def test_length_explains_everything_when_longer_is_better(report):
    assert report["length"]["answers"] == {"r": 1.0, "low": None, "high": None, "n": 6}
    assert report["length"]["pairs"]["r"] == 1.0


def test_whitespace_that_changes_the_order_is_a_flip(report):
    """The second pair: 3 against 4 is out of order, 5 against 4 in order. Differences 0, 2, 0."""
    found = report["invariances"]["whitespace"]
    assert (found["flips"], found["n"], found["share"]) == (1, 3, 1 / 3)
    assert (found["mean"], found["largest"]) == (pytest.approx(2 / 3), 2.0)


def test_correlation_is_pearsons_with_fishers_interval():
    x, y = [1, 2, 4, 4, 7, 9], [2.0, 1.0, 5.0, 3.0, 4.0, 8.0]
    found, expected = measure.correlation(x, y), pearsonr(x, y)
    assert found["r"] == pytest.approx(expected.statistic)
    interval = expected.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert measure.correlation([1, 1, 1], [1, 2, 3])["r"] is None
    assert measure.correlation([1, 2, 4], [0.1, 0.1, 0.1])["r"] is None
    assert measure.correlation([], [])["r"] is None


def test_all_is_scored_in_one_call_with_the_answers_of_a_prompt(real):
    calls = []

    def score(rows):
        calls.append(list(rows))
        return [0.0] * len(rows)

    measure.measure(real, {"empty": [Probe(2, "", [2]), Probe(0, "", [2])]}, score)
    (rows,) = calls
    assert rows[:2] == [([5, 6], [7, 8, 9, 2]), ([5, 6], [7, 2])]
    assert rows[6:] == [([5, 6], [2]), ([6, 6, 6], [2])]


def test_metrics_have_no_gaps_and_the_report_is_plain(report):
    found = measure.metrics(report)
    assert (
        found["probe/long"] == 1.0 and found["probe/shift/long"] == 4.0 and found["probe/whitespace"] == 1 / 3
    )
    assert found["probe/length_pairs"] == 1.0
    assert "probe/thanks" not in found and all(math.isfinite(value) for value in found.values())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
