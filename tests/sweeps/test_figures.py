"""What a sweep compares, from metrics as the stages report them."""

from __future__ import annotations

import pytest

from rlhf_exp.sweeps import figures

RFT = {"rft/score": 0.5, "rft/kept_score": 0.9, "train/loss": 2.0}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"train/loss": 2.0}, ("train/loss", 2.0)),
        ({"objective/scores": 0.5, "objective/gold": 0.25, "train/loss": 2.0}, ("objective/gold", 0.25)),
        ({"objective/scores": 0.5, "objective/gold": None}, ("objective/scores", 0.5)),
        (RFT | {"rft/round": 1.0}, ("train/loss", 2.0)),  # of the policy before any training
        (RFT | {"rft/round": 2.0}, ("rft/score", 0.5)),
        (RFT | {"rft/round": 3.0, "rft/gold": 0.0}, ("rft/gold", 0.0)),
        ({"answers": 3.0}, (None, None)),
    ],
)
def test_the_objective(metrics, expected):
    assert figures.objective(metrics) == expected


def test_what_runs_is_compared_by_what_it_ends_with():
    """Where rft's objective is a score its running value is one too, and no loss between."""
    assert figures.running(1)[-1] == "train/loss"
    assert figures.running(2) == ("rft/gold", "rft/score")
