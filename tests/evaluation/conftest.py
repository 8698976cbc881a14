"""An evaluation and training curves, made by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest

from tests.evaluation import browser


@pytest.fixture(scope="session")
def chromium() -> None:
    """For tests that look at a page."""
    browser.require()


@pytest.fixture
def evaluation(made_evaluation) -> dict:
    """One that a test may change."""
    return deepcopy(made_evaluation)


@pytest.fixture
def with_data(evaluation) -> dict:
    """With the data's own answers, which score best of all, and an average that no step had."""
    figures = {"reward": 9.25, "reward_se": 0.25, "gold": 0.9375, "gold_se": 0.05, "length": 21.5}
    figures |= {"answers": 128.0, "prompts": 64.0, "distinct_2": 0.875, "empty_rate": 0.0, "eos_rate": 1.0}
    evaluation["data"] = {"name": "data", "kind": "demonstrations", "metrics": figures}
    last = evaluation["policies"][-1]
    average = {
        "name": "ppo (ema)",
        "step": None,
        "metrics": {**last["metrics"], "gold": 0.625, "reward": 2.0, "kl": 6.0},
    }
    evaluation["policies"].insert(-1, average)
    return evaluation


@pytest.fixture
def curves(made_curves) -> list[dict]:
    """Some that a test may change."""
    return deepcopy(made_curves)


@pytest.fixture(scope="session")
def made_evaluation() -> dict:
    """SFT and three checkpoints; the second has the best gold score, the third the best reward."""
    rows = [
        (
            "sft",
            0,
            {"gold": 0.1, "gold_se": 0.06, "reward": -0.5, "reward_se": 0.2, "kl": 0.0, "length": 14.2},
        ),
        (
            "ppo@8",
            8,
            {"gold": 0.3, "gold_se": 0.05, "reward": 0.75, "reward_se": 0.2, "kl": 1.25, "length": 13.5},
        ),
        (
            "ppo@16",
            16,
            {"gold": 0.625, "gold_se": 0.04, "reward": 1.5, "reward_se": 0.1, "kl": 4.0, "length": 13.0},
        ),
        (
            "ppo@24",
            24,
            {"gold": 0.5, "gold_se": 0.04, "reward": 2.25, "reward_se": 0.1, "kl": 7.0, "length": 12.0},
        ),
    ]
    rest = {"distinct_2": 0.75, "empty_rate": 0.0, "eos_rate": 0.96875}
    policies = [{"name": name, "step": step, "metrics": metrics | rest} for name, step, metrics in rows]
    samples = [
        {
            "prompt": f"The soup in place {i}",
            "responses": {
                name: {
                    "text": f"answer {i} of {name}",
                    "reward": i + step / 8,
                    "gold": step / 32,
                    "ended": True,
                }
                for name, step, _ in rows
            },
        }
        for i in range(3)
    ]
    return {"policies": policies, "samples": samples}


@pytest.fixture(scope="session")
def made_curves() -> list[dict]:
    """Twenty-four PPO steps."""
    return [
        {
            "step": step,
            "objective/scores": step / 10,
            "objective/gold": step / 40,
            "objective/kl": step / 4,
            "objective/entropy": 3 - step / 24,
            "response/length_mean": 14.0 - step / 12,
            "response/eos_rate": 0.9,
            "policy/approxkl": 0.01,
            "policy/ratio_mean": 1.0,
            "time/rollout": 3.0,
            "time/score": 0.5,
            "time/update": 2.5,
        }
        for step in range(1, 25)
    ]
