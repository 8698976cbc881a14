"""What a rank sends in an optimiser step and in a rollout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_exp.memory import sampling, training
from rlhf_exp.memory.counted import BYTES, GRADIENTS, PARAMETERS, Facts, Item
from rlhf_exp.memory.strategies import SHARDED_BASE, SHARDED_MOMENTS
from rlhf_exp.schema import EvalRun, ILQLRun, PPORun, PreferRun, RewardRun, RFTRun, Run

SCORES = 3  # forwards of an answer before the update: old log-probs, the reference's, the reward model's


@dataclass(frozen=True)
class Passes:
    """Forwards and backwards through the base on one rank; each gathers all layers under zero3."""

    step: int  # in an optimiser step
    rollout: int  # for a rollout and its scores; sampling itself counts as one


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank sends in one optimiser step, and in one rollout with its scores."""

    step: float
    rollout: float
    why: str


def passes(config: Run, facts: Facts) -> Passes:
    """As many micro-batches as the fullest rank has, each a forward and a backward.

    An own critic of PPO reads the base once more.
    """
    if isinstance(config, PPORun):
        hand = sampling.hand(config, facts)
        twice = 2 if sampling.own_critic(config) else 1
        answers = math.ceil(config.ppo.batch_size * config.ppo.samples_per_prompt / facts.ranks)
        scores = (SCORES + twice - 1) * math.ceil(answers / hand.rows)
        return Passes(2 * twice * math.ceil(hand.mine / hand.rows), 1 + scores)
    sampled = int(isinstance(config, RFTRun | EvalRun | PreferRun | ILQLRun))
    if not hasattr(config, "train"):
        return Passes(0, sampled)
    if isinstance(config, RewardRun):
        rows = training.pairs(config, facts)
    else:
        rows = training.micro_rows(config, facts, config.train.batch_size)
    return Passes(2 * math.ceil(math.ceil(config.train.batch_size / facts.ranks) / rows), sampled)


def volume(config: Run, facts: Facts, items: Iterable[Item]) -> Volume:
    """What a rank sends, by ring algorithms: all-reduce 2 (n - 1) / n of the bytes, all-gather (n - 1) / n.

    items: of one process. With LoRA only adapters' gradients are summed: the frozen base has none.
    """
    strategy, ranks = config.strategy.name, facts.ranks
    if ranks == 1:
        return Volume(0.0, 0.0, "one rank")
    items = list(items)
    ring = (ranks - 1) / ranks
    gradients = sum(item.bytes for item in items if item.kind == GRADIENTS)
    step, why = 2 * ring * gradients, "gradients of adapters and heads, summed"
    if strategy in SHARDED_MOMENTS:
        # DeepSpeed sums them once more (zero_adamw.py), and gathers what each rank has stepped
        step, why = 5 * ring * gradients, "gradients summed twice, stepped weights gathered"
    rollout = 0.0
    if strategy in SHARDED_BASE:
        base = sum(i.bytes for i in items if i.role == "base" and i.kind == PARAMETERS and not i.label)
        layers = max(0.0, base - facts.model.by_token * BYTES[facts.dtype])
        found = passes(config, facts)
        step += found.step * ring * layers
        rollout = found.rollout * ring * layers
        why += f", layers gathered in {found.step} forwards and backwards"
    return Volume(step, rollout, why)
