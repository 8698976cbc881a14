"""PPO's options: each against the plain implementation, each from a start with KL 0 and ratio 1."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp import schema
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles
from rlhf_exp.stages import order, ppo
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.ptx import Demonstrations
from rlhf_exp.stages.references import References
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import loss_of
from rlhf_exp.tracking import read_metrics
from tests.stages.plain import (
    LENGTHS,
    ROWS,
    SCORES,
    gradients,
    iterate,
    nudge,
    plain_experience,
    plain_loss,
    prepare,
)

FUNCTION = {"kind": "function", "function": "length"}

# settings, and the critic of the fixture `actors`
CASES = {
    "reference": ({"score_scaling": "reference"}, "trunk"),
    "running": ({"score_scaling": "running", "reward_clip": 1.0}, "trunk"),
    "fixed score": ({"missing_eos": "score", "missing_eos_score": -3.0}, "trunk"),
    "long answers": ({"length_penalty": 0.25, "length_budget": 3}, "trunk"),
    "whitened rewards": ({"whiten_rewards": True, "gamma": 0.9}, "trunk"),
    "clip-higher": ({"cliprange": 0.05, "cliprange_high": 0.3}, "trunk"),
    "dual clip": ({"dual_clip": 1.05, "cliprange": 0.02}, "trunk"),
    "sequence mean": ({"loss_mean": "sequence"}, "own"),
    "no value clip": ({"cliprange_value": None, "vf_coef": 1.0}, "own"),
    "KL in the loss": ({"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.5}, "trunk"),
    "KL k2 in the loss": ({"kl_in": "loss", "kl_estimator": "k2", "loss_mean": "sequence"}, "trunk"),
    "entropy": ({"entropy_coef": 0.7}, "trunk"),
    "entropy, sequence mean": ({"entropy_coef": 0.7, "loss_mean": "sequence"}, "none"),
    "detached": ({"vf_coef": 1.0}, "detached"),
    "rloo": ({"estimator": "rloo", "samples_per_prompt": 2}, "none"),
    "grpo": (
        {
            "estimator": "grpo",
            "samples_per_prompt": 4,
            "kl_in": "loss",
            "kl_estimator": "k3",
            "loss_mean": "sequence",
        },
        "none",
    ),
    "reinforce": ({"estimator": "reinforce"}, "none"),
}


@pytest.mark.parametrize("name", CASES)
def test_experience_and_loss_are_those_of_the_definitions(name, actors, rollout, ppo_config):
    settings, critic = CASES[name]
    config, actors = ppo_config(settings), actors[critic]
    plan = order.minibatches(rollout, config, step=1)
    experience, metrics = prepare(config, actors, rollout, SCORES, plan[0])
    plain = plain_experience(config, actors, rollout, SCORES)
    for row, expected in enumerate(plain):
        n = LENGTHS[row]
        for field in ("values", "advantages", "returns"):
            whole = getattr(experience, field)[row]
            assert torch.allclose(whole[:n], getattr(expected, field), atol=2e-5), field
            assert (whole[n:] == 0).all()
    assert ("critic/explained_variance" in metrics) == (critic != "none")
    nudge(actors)
    rows = list(range(ROWS))
    expected = plain_loss(config, actors, rollout, plain, rows)
    expected.backward()
    wanted = gradients(actors)
    # in two micro-batches: shares of the same denominator add up
    denominator = experience.mask.sum() if config.ppo.loss_mean == "token" else torch.tensor(ROWS)
    total = 0.0
    for part in (rows[:3], rows[3:]):
        loss, shares, _ = loss_of(config, actors, rollout, experience, part, denominator)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=2e-5)
    for got, want in zip(gradients(actors), wanted, strict=True):
        assert torch.allclose(got, want, atol=2e-5)
    assert ("critic/loss" in shares) == (critic != "none")


def test_each_case_changes_something(actors, rollout, ppo_config):
    """Else a case could pass without its option being looked at."""
    found = {}
    for name, (settings, critic) in (CASES | {"default": ({}, "trunk"), "default own": ({}, "own")}).items():
        config = ppo_config(settings)
        plain = plain_experience(config, actors[critic], rollout, SCORES)
        advantages = torch.cat([row.advantages for row in plain])
        nudge(actors[critic])
        with torch.no_grad():
            loss = plain_loss(config, actors[critic], rollout, plain, range(ROWS))
        with torch.no_grad():  # back to where it was
            draw = torch.Generator().manual_seed(0)
            for parameter in actors[critic].trainable():
                parameter -= 0.05 * torch.randn(parameter.shape, generator=draw)
        found[name] = (loss.item(), advantages)
    for name, (_, critic) in CASES.items():
        default = found["default own" if critic == "own" else "default"]
        same = found[name][0] == pytest.approx(default[0], abs=1e-4)
        if critic != "detached":  # its loss is the same, its gradient is not
            assert not same, name


# ---------------------------------------------------------------- the start, with every option

STARTS = {
    "scores": {"score_scaling": "running", "missing_eos": "score", "whiten_rewards": True},
    "controller": {"kl_control": "adaptive", "length_penalty": 0.1, "length_budget": 2},
    "clips": {"cliprange_high": 0.3, "dual_clip": 3.0, "loss_mean": "sequence", "cliprange_value": None},
    "guards": {"target_kl": 0.1, "ratio_guard": 10.0, "ema_decay": 0.9},
    "ptx and entropy": {"ptx_coef": 2.0, "entropy_coef": 0.01},
    "own from zero": {"critic": "own", "critic_init": "zero", "critic_lr": 1e-3, "critic_warmup": 1},
    "detached": {"critic": "detached"},
    "rloo": {"estimator": "rloo", "samples_per_prompt": 2, "batch_size": 4},
    "grpo": {"estimator": "grpo", "samples_per_prompt": 2, "kl_in": "loss", "kl_estimator": "k3"},
    "reinforce": {"estimator": "reinforce"},
}


@pytest.mark.parametrize("name", STARTS)
def test_every_option_starts_where_sft_ended(base, adapters, context, ppo_config, name):
    config = ppo_config({"minibatches": 2, "epochs": 2, "micro_batch_size": 3, **STARTS[name]})
    with Roles(base) as roles:
        given = context(sft=adapters["sft"], reward=adapters["reward"])
        actors = build_actors(config, given, roles)
        carried = ppo.Carried(State.start(config.ppo), References(config), Demonstrations.load(config, given))
        metrics = iterate(config, actors, carried=carried)
    assert metrics["objective/kl"] == 0
    assert metrics["objective/kl_max"] == 0
    assert metrics["first/ratio_max"] == 1
    assert metrics["first/approxkl"] == 0
    assert ("critic/loss" in metrics) == (config.ppo.estimator == "gae")
    assert all(math.isfinite(value) for value in metrics.values())


# ---------------------------------------------------------------- whole runs


def test_a_run_without_a_critic_publishes_none(context, ppo_config):
    settings = {"steps": 2, "estimator": "rloo", "samples_per_prompt": 2, "batch_size": 4, "ema_decay": 0.5}
    given = context()
    ppo.run(ppo_config({**settings, "critic": "own"}, reward_source=FUNCTION), given)
    folders = {path.name for path in given.folder.path.iterdir() if path.is_dir()}
    assert folders == {"adapter", "ema", "state"}  # the pipeline clears the last
    policy, average = (
        load_file(given.folder.path / name / "adapter_model.safetensors") for name in ("adapter", "ema")
    )
    assert policy.keys() == average.keys()
    assert any(not torch.equal(policy[name], average[name]) for name in policy)
    lines = read_metrics(given.folder.path / "metrics.jsonl")
    assert len(lines) == 2
    assert not any(name.startswith("critic/") for name in lines[0])


def test_a_run_with_much_of_it_on(context, ppo_config):
    settings = {
        **{"steps": 3, "critic": "own", "critic_init": "zero", "critic_lr": 1e-3, "critic_warmup": 1},
        **{"ptx_coef": 1.0, "kl_control": "adaptive", "score_scaling": "running", "ema_decay": 0.9},
        **{"loss_mean": "sequence", "dual_clip": 3.0, "ratio_guard": 10.0, "target_kl": 1.0, "save_every": 2},
    }
    given = context()
    ppo.run(ppo_config(settings, reward_source=FUNCTION), given)
    lines = read_metrics(given.folder.path / "metrics.jsonl")
    assert [line["optim/critic_lr"] for line in lines] == [1e-3] * 3
    assert ["ptx/loss" in line for line in lines] == [False, True, True]  # not in the warm-up
    first, second, third = (line["objective/kl_coef"] for line in lines)
    assert first == second != third  # steered only once the policy moves
    folders = {path.name for path in given.folder.path.iterdir() if path.is_dir()}
    assert folders == {"adapter", "checkpoints", "critic", "ema", "head", "state"}
    assert ScalarHead.load(given.folder.path / "head" / "head.safetensors").weight.abs().sum() > 0


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"estimator": "rloo"}, "ppo.samples_per_prompt must be at least 2, got 1"),
        ({"estimator": "grpo"}, "ppo.samples_per_prompt must be at least 2, got 1"),
        ({"kl_in": "loss"}, "ppo.kl_in=loss needs ppo.kl_estimator=k2 or k3"),
        ({"kl_in": "loss", "kl_estimator": "k3", "kl_control": "adaptive"}, "it needs ppo.kl_in=reward"),
        ({"steps": 9, "estimator": "reinforce", "critic_warmup": 3}, "ppo.estimator=reinforce has none"),
        ({"critic_init": "reward"}, "needs ppo.critic=own and reward_source.kind=learned"),
        ({"estimator": "rloo", "samples_per_prompt": 2, "critic_lr": 1e-3}, "ppo.estimator=rloo has none"),
        ({"steps": 3, "critic_warmup": 3}, "leaves the policy no iteration"),
        ({"kl_control": "adaptive", "kl_horizon": 1.0}, "too short for 8 answers an iteration"),
        ({"kl_control": "adaptive", "kl_coef": 0.0}, "which is 0 and would stay so"),
        ({"dual_clip": 1.0}, "ppo.dual_clip must be more than 1, got 1.0"),
        ({"ema_decay": 1.0}, "ppo.ema_decay must be less than 1, got 1.0"),
    ],
)
def test_what_does_not_go_together(ppo_config, settings, said):
    (problem,) = schema.problems(ppo_config(settings))
    assert said in problem


def test_demonstrations_must_be_there(ppo_config):
    config = ppo_config({"ptx_coef": 1.0})
    assert schema.problems(config) == []
    assert schema.views_of(config) == ("prompts", "demonstrations")
    assert schema.views_of(ppo_config()) == ("prompts",)
    config.dataset.views = schema.Views(None, "builtin:reviews", "builtin:reviews")
    (problem,) = schema.problems(config)
    assert "ppo.ptx_coef=1.0" in problem
    assert "dataset.views.demonstrations is null" in problem
