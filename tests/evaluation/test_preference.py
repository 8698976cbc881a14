"""Accuracy, calibration and margins by hand, by source; and the picture of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.data.records import Comparison
from rlhf_exp.evaluation import preference
from rlhf_exp.evaluation.preference_figures import panels
from rlhf_exp.evaluation.render import WIDE, svg, write_png


def row(i: int, chosen: str = "longer", rejected: str = "short", source: str = "") -> Comparison:
    return Comparison(i, f"prompt {i}", chosen, rejected, source=source)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    # confidences .52 .54 (bin .5 to .55), .97 .99 (bin .95 to 1); of the first one is right, of the second both
    margins = np.array([logit(0.52), -logit(0.54), logit(0.97), logit(0.99)])
    found = preference.calibration(margins)
    assert len(found["bins"]) == 10
    first, last = found["bins"][0], found["bins"][-1]
    assert (first["low"], first["high"], first["pairs"]) == (0.5, pytest.approx(0.55), 2)
    assert (first["confidence"], first["accuracy"]) == (pytest.approx(0.53), 0.5)
    assert (last["confidence"], last["accuracy"], last["pairs"]) == (pytest.approx(0.98), 1.0, 2)
    assert [each["pairs"] for each in found["bins"][1:-1]] == [0] * 8
    assert "accuracy" not in found["bins"][1]
    assert found["ece"] == pytest.approx(0.5 * 0.03 + 0.5 * 0.02)


def test_calibration_by_the_definition():
    generator = np.random.default_rng(0)
    margins = generator.normal(0.5, 2, 500)
    total = 0.0
    for i in range(10):
        low, high = 0.5 + i / 20, 0.55 + i / 20
        inside = [m for m in margins if low < 1 / (1 + math.exp(-abs(m))) <= high]
        if inside:
            sure = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
            right = sum(m > 0 for m in inside) / len(inside)
            total += len(inside) / 500 * abs(sure - right)
    assert preference.calibration(margins)["ece"] == pytest.approx(total)


def test_a_calibrated_model_has_an_error_near_0_and_an_overconfident_one_has_not():
    generator = np.random.default_rng(1)
    true = generator.normal(0, 1.5, 20_000)
    margins = np.where(generator.random(20_000) < 1 / (1 + np.exp(-true)), true, -true)
    assert preference.calibration(margins)["ece"] < 0.02
    assert preference.calibration(3 * margins)["ece"] > 0.1


def test_ties_are_half_right_and_in_the_first_bin():
    found = preference.calibration(np.zeros(3))
    assert found["bins"][0] == {"low": 0.5, "high": 0.55, "pairs": 3, "confidence": 0.5, "accuracy": 0.5}
    assert found["ece"] == 0


def test_certainty_is_in_the_last_bin():
    assert preference.calibration(np.array([1e4, -1e4]))["bins"][-1]["pairs"] == 2


def test_the_histogram_by_hand():
    found = preference.histogram(np.array([-2.0, -1.9, 0.1, 1.0]), bins=4)
    assert found["edges"] == [-2, -1, 0, 1, 2]
    assert found["counts"] == [2, 0, 1, 1]
    assert found["mean"] == pytest.approx(-0.7)
    assert found["std"] == pytest.approx(math.sqrt((1.3**2 + 1.2**2 + 0.8**2 + 1.7**2) / 4))
    assert sum(preference.histogram(np.zeros(5))["counts"]) == 5


def test_all_of_it_by_hand():
    rows = [row(1, source="a"), row(2, "s", "longer", source="a"), row(3, source="b"), row(4)]
    scores = [(1.0, 0.0), (0.0, 2.0), (0.5, 0.5), (3.0, 0.0)]
    found = preference.assess(rows, scores)
    assert found["pairs"] == 4
    assert found["accuracy"] == 2.5 / 4
    assert found["length_accuracy"] == 3 / 4
    losses = [math.log(1 + math.exp(-m)) for m in (1, -2, 0, 3)]
    assert found["loss"] == pytest.approx(sum(losses) / 4)
    a, b = found["sources"]
    assert (a["source"], a["pairs"], a["accuracy"], a["length_accuracy"]) == ("a", 2, 0.5, 0.5)
    assert (b["source"], b["pairs"], b["accuracy"], b["length_accuracy"]) == ("b", 1, 0.5, 1.0)
    assert a["accuracy_low"] < 0.5 < a["accuracy_high"]
    flat = preference.metrics(found)
    assert flat["validation/source/a/accuracy"] == 0.5
    assert flat["validation/ece"] == found["calibration"]["ece"]
    assert flat["validation/margin"] == 0.5


def test_pairs_of_one_prompt_are_not_independent():
    """20 prompts of 6 pairs, all right of 14 and all wrong of 6: Wilson's interval of 14 of 20, not of 84 of 120."""
    rows = [row(prompt) for prompt in range(20) for _ in range(6)]
    scores = [(float(prompt < 14), 0.5) for prompt in range(20) for _ in range(6)]
    found = preference.assess(rows, scores)
    assert found["accuracy"] == pytest.approx(0.7)
    expected = stats.binomtest(14, 20).proportion_ci(method="wilson")
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((expected.low, expected.high))
    alone = preference.assess([row(i) for i in range(120)], scores)
    expected = stats.binomtest(84, 120).proportion_ci(method="wilson")
    assert (alone["accuracy_low"], alone["accuracy_high"]) == pytest.approx((expected.low, expected.high))


def test_names_of_sources_become_metric_names():
    rows = [row(1, source="ref / sup2 (TL;DR)")]
    flat = preference.metrics(preference.assess(rows, [(1.0, 0.0)]))
    assert "validation/source/ref - sup2 -TL-DR-/accuracy" in flat


def test_without_sources_there_are_none():
    assert preference.assess([row(1)], [(1.0, 0.0)])["sources"] == []


def test_the_most_frequent_sources_only():
    rows = [row(i, source=f"s{i}") for i in range(30)] + [row(99, source="s29")]
    found = preference.by_source(rows, [(1.0, 0.0)] * 31)
    assert len(found) == 20 and found[0]["source"] == "s29"


@pytest.mark.parametrize("scores", [[(0.0, 0.0)], [(1.0, -1.0), (0.2, 0.9), (-5.0, 2.0)]])
def test_the_picture(tmp_path, scores):
    found = preference.assess([row(i) for i in range(len(scores))], scores)
    made = panels(found)
    path = write_png(tmp_path / "margins.png", made, 2, WIDE)
    assert path.read_bytes()[:4] == b"\x89PNG"
    text = svg(made[0], WIDE, "m")
    assert "Margins" in text and f"{len(scores)} pairs" in text
    assert "calibration error" in svg(made[1], WIDE, "c")
