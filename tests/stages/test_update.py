"""Guards, the average of the policy, and the critic."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_exp.model.roles import Roles
from rlhf_exp.stages import order, ppo
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.optim import adamw
from rlhf_exp.stages.references import References
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import clip_gradients, loss_of, update
from tests.stages.plain import (
    ROWS,
    SCORES,
    gradients,
    prepare,
    prompts_of,
    updated,
)


def test_minibatches_with_a_large_ratio_are_skipped_and_counted(actors, rollout, ppo_config):
    settings = {"epochs": 2, "minibatches": 2}
    metrics, moved = updated(ppo_config({**settings, "ratio_guard": 0.5}), actors["trunk"], rollout)
    assert metrics["policy/ratio_mean"] > 0.5
    assert (metrics["policy/skipped"], metrics["optim/updates"], any(moved)) == (4, 0, False)
    metrics, moved = updated(ppo_config({**settings, "ratio_guard": 1e6}), actors["trunk"], rollout)
    assert (metrics["policy/skipped"], metrics["optim/updates"], any(moved)) == (0, 4, True)


def test_only_the_minibatch_that_is_too_far_is_skipped(actors, rollout, ppo_config):
    config, actors = ppo_config({"minibatches": 2, "ratio_guard": 1.0}), actors["trunk"]
    plan = order.minibatches(rollout, config, step=1)
    experience, _ = prepare(config, actors, rollout, SCORES, plan[0])
    # the rollout's log-probs of the first minibatch are lowered: its ratios are e, the others' 1/e
    first = [row for rows in plan[0][0] for row in rows]
    shift = torch.ones(ROWS, 1)
    shift[first] = -1.0
    experience = experience._replace(logprobs=torch.where(experience.mask, experience.logprobs + shift, 0))
    optimizer = torch.optim.SGD(actors.trainable(), lr=0.0)
    metrics = update(config, actors, optimizer, State.start(config.ppo), rollout, experience, plan)
    assert metrics["policy/skipped"] == 1
    assert metrics["optim/updates"] == 1


def test_a_ratio_that_is_no_number_is_skipped(actors, rollout, ppo_config):
    config, actors = ppo_config({"ratio_guard": 10.0}), actors["trunk"]
    plan = order.minibatches(rollout, config, step=1)
    experience, _ = prepare(config, actors, rollout, SCORES, plan[0])
    experience = experience._replace(logprobs=experience.logprobs * math.nan)
    optimizer = torch.optim.SGD(actors.trainable(), lr=0.1)
    metrics = update(config, actors, optimizer, State.start(config.ppo), rollout, experience, plan)
    assert metrics["policy/skipped"] == 1
    assert all(p.isfinite().all() for p in actors.trainable())


def test_updates_end_when_the_policy_is_too_far(actors, rollout, ppo_config):
    settings = {"epochs": 3, "minibatches": 2}
    metrics, moved = updated(ppo_config({**settings, "target_kl": 1e-9}), actors["trunk"], rollout)
    assert metrics["policy/approxkl"] > 1.5e-9
    assert (metrics["optim/updates"], any(moved)) == (0, False)
    metrics, _ = updated(ppo_config({**settings, "target_kl": 100.0}), actors["trunk"], rollout)
    assert metrics["optim/updates"] == 6
    # the first minibatch, before any step, is at KL 0: a step is made, and the next is too far
    metrics, moved = updated(
        ppo_config({**settings, "target_kl": 1e-9}), actors["trunk"], rollout, move=False
    )
    assert (metrics["optim/updates"], any(moved)) == (1, True)


def test_target_kl_is_met_at_one_and_a_half(actors, rollout, ppo_config):
    """approxkl between target and 1.5 target goes on, above it ends."""
    measured, _ = updated(ppo_config(), actors["trunk"], rollout)
    kl = measured["first/approxkl"]
    for target, updates in ((kl / 1.4, 1), (kl / 1.6, 0)):
        config = ppo_config({"target_kl": target})
        plan = order.minibatches(rollout, config, step=1)
        experience, _ = prepare(config, actors["trunk"], rollout, SCORES, plan[0])
        # ratios all exp(x) with k3 = exp(x) - 1 - x = kl
        x = shift_with_k3(kl)
        experience = experience._replace(logprobs=torch.where(experience.mask, experience.logprobs - x, 0))
        optimizer = torch.optim.SGD(actors["trunk"].trainable(), lr=0.0)
        metrics = update(
            config, actors["trunk"], optimizer, State.start(config.ppo), rollout, experience, plan
        )
        assert metrics["optim/updates"] == updates


def shift_with_k3(kl: float) -> float:
    low, high = 0.0, 5.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.expm1(middle) - middle < kl else (low, middle)
    return low


# ---------------------------------------------------------------- average of the policy


def test_the_average_follows_the_policy_update_by_update(base, adapters, context, ppo_config):
    config = ppo_config({"ema_decay": 0.75, "epochs": 3})
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        seen = [[p.detach().clone() for p in roles.parameters("policy")]]
        optimizer = torch.optim.SGD(actors.trainable(), lr=0.1)
        step = optimizer.step

        def recorded(*arguments):
            step(*arguments)
            seen.append([p.detach().clone() for p in roles.parameters("policy")])

        optimizer.step = recorded
        carried = ppo.Carried(State.start(config.ppo), References(config))
        ppo.iterate(config, actors, optimizer, 1, *prompts_of(), carried)
        assert len(seen) == 4
        expected = seen[0]
        for now in seen[1:]:
            expected = [0.75 * mean + 0.25 * p for mean, p in zip(expected, now, strict=True)]
        for got, want in zip(roles.parameters("ema"), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-6)
            assert not got.requires_grad
        assert any(
            not torch.allclose(got, last, atol=1e-4)
            for got, last in zip(roles.parameters("ema"), seen[-1], strict=True)
        )


# ---------------------------------------------------------------- the critic


def test_a_detached_critic_gives_the_policy_no_gradient(actors, rollout, ppo_config):
    found = {}
    for vf_coef in (0.0, 5.0):
        config = ppo_config({"vf_coef": vf_coef})
        for critic in ("trunk", "detached"):
            epoch = order.minibatches(rollout, config, 1)[0]
            experience, _ = prepare(config, actors[critic], rollout, SCORES, epoch)
            loss_of(config, actors[critic], rollout, experience, range(ROWS), experience.mask.sum())[
                0
            ].backward()
            policy = [p.grad.clone() for p in actors[critic].roles.parameters("policy")]
            head = actors[critic].value_head.weight.grad.clone()
            gradients(actors[critic])
            found[vf_coef, critic] = policy, head
    for detached, plain in zip(found[5.0, "detached"][0], found[0.0, "trunk"][0], strict=True):
        assert torch.allclose(detached, plain, atol=1e-6)
    assert torch.allclose(found[5.0, "detached"][1], found[5.0, "trunk"][1], atol=1e-6)
    assert any(
        not torch.allclose(a, b, atol=1e-4)
        for a, b in zip(found[5.0, "trunk"][0], found[0.0, "trunk"][0], strict=True)
    )


@pytest.mark.parametrize("critic", ["trunk", "detached", "own"])
def test_what_shares_no_trunk_is_clipped_by_its_own_norm(base, adapters, context, ppo_config, critic):
    config = ppo_config({"critic": critic})
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        parts = {"policy": roles.parameters("policy"), "critic": actors.critic_parameters()}
        for size, parameters in zip((3.0, 4000.0), parts.values(), strict=True):
            for parameter in parameters:  # the norm over the part is `size`
                count = sum(p.numel() for p in parameters)
                parameter.grad = torch.full_like(parameter, size / math.sqrt(count))
        found = clip_gradients(actors, 2.0)
        after = {name: math.sqrt(sum(float(p.grad.square().sum()) for p in ps)) for name, ps in parts.items()}
        for parameter in actors.trainable():
            parameter.grad = None
    if critic == "trunk":
        assert found == {"policy/grad_norm": pytest.approx(math.hypot(3, 4000), rel=1e-4)}
        assert after == {"policy": pytest.approx(3 / 2000, rel=1e-2), "critic": pytest.approx(2.0, rel=1e-3)}
    else:
        names = {"policy/grad_norm": 3.0, "critic/grad_norm": 4000.0}
        assert found == {name: pytest.approx(size, rel=1e-4) for name, size in names.items()}
        assert after == {"policy": pytest.approx(2.0, rel=1e-3), "critic": pytest.approx(2.0, rel=1e-3)}


@pytest.mark.parametrize("critic", ["trunk", "own", "detached"])
def test_the_warm_up_trains_the_critic_alone(base, adapters, context, ppo_config, critic):
    config = ppo_config({"critic": critic, "critic_warmup": 1, "epochs": 2, "ema_decay": 0.5})
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)

        def copies():
            policy, own = roles.parameters("policy"), actors.critic_parameters()
            return ([p.detach().clone() for p in part] for part in (policy, own))

        policy, own = copies()
        optimizer = adamw(actors.groups(config.ppo), config.optim)
        carried = ppo.Carried(State.start(config.ppo), References(config))
        moved = []
        for step in (1, 2):
            ppo.iterate(config, actors, optimizer, step, *prompts_of(), carried)
            after_policy, after_own = copies()
            moved.append(
                tuple(
                    any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
                    for before, after in ((policy, after_policy), (own, after_own))
                )
            )
        assert moved == [(False, True), (True, True)]


def test_a_critic_of_its_own_from_zero(base, adapters, context, ppo_config):
    config = ppo_config({"critic": "own", "critic_init": "zero"})
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        assert (actors.value_head.weight == 0).all()
        assert actors.value_head.bias == 0
        b = [p for name, p in base.model.named_parameters() if ".lora_B.critic." in name]
        assert b
        assert all((p == 0).all() for p in b)


def test_the_critic_has_its_own_learning_rate(base, adapters, context, ppo_config):
    config = ppo_config({"critic": "own", "critic_lr": 3e-3}, optim={"lr": 1e-4})
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        optimizer = adamw(actors.groups(config.ppo), config.optim)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert {rates[id(p)] for p in roles.parameters("policy")} == {1e-4}
        own = [*roles.parameters("critic"), *actors.value_head.parameters()]
        assert {rates[id(p)] for p in own} == {3e-3}
        assert len(rates) == len(actors.trainable())
        assert {
            group["lr"] for group in adamw(actors.groups(ppo_config().ppo), config.optim).param_groups
        } == {1e-4}
