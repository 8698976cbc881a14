"""The forward that old log-probs and the first update share: numbers as of two forwards, and never a stale one."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.stages import order
from rlhf_exp.stages.experience import state_of
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import accumulate
from tests.stages.plain import SCORES, prepare


def running(config) -> State:
    """Of a run that has made an update: before the first one nothing is shared."""
    state = State.start(config.ppo)
    state.updates = 1
    return state


def gradients(actors):
    found = [None if p.grad is None else p.grad.clone() for p in actors.trainable()]
    for parameter in actors.trainable():
        parameter.grad = None
    return found


@pytest.mark.parametrize("critic", ["trunk", "own"])
@pytest.mark.parametrize("critic_only", [False, True])
def test_gradient_and_figures_are_those_of_a_forward_of_its_own(
    actors, rollout, ppo_config, critic, critic_only
):
    config, who = ppo_config(), actors[critic]
    minibatch = order.minibatches(rollout, config, step=1)[0][0]
    given, _ = prepare(config, who, rollout, SCORES, [minibatch], running(config))
    assert given.first and given.first[0]
    shared = accumulate(config, who, rollout, given, minibatch, critic_only), gradients(who)
    assert not given.first[0]  # taken out
    alone = accumulate(config, who, rollout, given, minibatch, critic_only), gradients(who)
    assert shared[0] == alone[0]
    for a, b in zip(shared[1], alone[1], strict=True):
        assert (a is None or not a.any()) if b is None else torch.equal(a, b)


def test_a_changed_weight_or_another_minibatch_is_forwarded_anew(actors, rollout, ppo_config):
    config, who = ppo_config(), actors["trunk"]
    minibatch = order.minibatches(rollout, config, step=1)[0][0]
    given, _ = prepare(config, who, rollout, SCORES, [minibatch], running(config))
    assert given.take_first([minibatch[0][::-1]], state_of(who)) is None
    given, _ = prepare(config, who, rollout, SCORES, [minibatch], running(config))
    with torch.no_grad():
        who.trainable()[0].mul_(1)
    assert given.take_first(minibatch, state_of(who)) is None


def test_several_micro_batches_keep_no_graph(actors, rollout, ppo_config):
    config = ppo_config()
    config.ppo.micro_batch_size = 1
    plan = order.minibatches(rollout, config, step=1)
    given, _ = prepare(config, actors["trunk"], rollout, SCORES, plan[0], running(config))
    assert given.first == ()


def test_before_the_first_update_the_start_check_has_two_forwards_to_compare(actors, rollout, ppo_config):
    config = ppo_config()
    minibatch = order.minibatches(rollout, config, step=1)[0][0]
    given, _ = prepare(config, actors["trunk"], rollout, SCORES, [minibatch])
    assert given.first == ()
