"""What the stages that sample answers hold: ppo, rft, eval, prefer; and the KV cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from rlhf_exp.memory import activations
from rlhf_exp.memory.activations import FLOAT
from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.memory.counted import (
    CACHE,
    DECODE,
    KEPT,
    LOGITS,
    PASSING,
    PREFILL,
    SCORE,
    TRAIN,
    Batch,
    Facts,
    Item,
)
from rlhf_exp.memory.logits import our_logits
from rlhf_exp.memory.training import forward_of, micro_batch, micro_rows
from rlhf_exp.memory.weights import frozen, numbers, trained
from rlhf_exp.schema import EvalRun, PPORun, PreferRun, RFTRun

ROOM = 64  # of rollout/cache.py
EVAL_ROWS = 64  # answers that eval generates together


def rft(config: RFTRun, facts: Facts) -> Iterator[Item]:
    adapter, model = numbers(config, facts), facts.model
    yield from trained("policy", adapter, config, facts)
    for role in facts.scorers:
        yield frozen(role, adapter)
    asked, answer = config.dataset.max_prompt_tokens, config.generation.max_new_tokens
    rows = math.ceil(EVAL_ROWS / facts.ranks)
    yield from rollout(facts, Batch(rows, asked, answer))
    batch = Batch(micro_rows(config, facts, config.train.batch_size), asked, answer)
    forward = forward_of(config, facts, train=False)
    yield from micro_batch(model, forward, batch, *our_logits(facts, batch.rows * answer))


def scoring(facts: Facts, batch: Batch) -> Item:
    passing = activations.passing(facts.model, facts.width, batch.tokens)
    return Item("reward", PASSING, passing, (SCORE,), label="forward")


def rollout(facts: Facts, batch: Batch) -> Iterator[Item]:
    """The cache as far as it has grown, the prompts' forward, and a step's logits for all rows."""
    model, width = facts.model, facts.width
    yield Item("policy", CACHE, cache(model, width, batch, 1), (PREFILL,))
    prefill = activations.passing(model, width, batch.rows * batch.prompt)
    yield Item("policy", PASSING, prefill, (PREFILL,), label="forward of the prompts")
    yield Item("policy", CACHE, cache(model, width, batch, batch.answer), (DECODE,))
    # raw and processed logits, their softmax, and that in float64 with its sums (rollout/sampler.py)
    step = batch.rows * model.vocabulary * (width + 2 * FLOAT + 16)
    yield Item("policy", LOGITS, step, (DECODE,), label="of a step")


def cache(model: Architecture, width: int, batch: Batch, steps: int) -> float:
    """Bytes of keys and values after `steps` tokens, with the room that is taken in advance (rollout/cache.py)."""
    held = batch.prompt + ROOM
    while held < batch.prompt + steps - 1:
        held += 1 + ROOM
    plain = (model.layers - model.windowed) * held
    windowed = model.windowed * min(held, model.window or held)
    return 2.0 * batch.rows * (plain + windowed) * model.key * width


class Hand(NamedTuple):
    """Rows that one rank has of a PPO minibatch, and of those the rows of a forward."""

    mine: int
    rows: int


def hand(config: PPORun, facts: Facts) -> Hand:
    ppo = config.ppo
    mine = math.ceil(ppo.batch_size * ppo.samples_per_prompt / ppo.minibatches / facts.ranks)
    rows = min(mine, ppo.micro_batch_size or mine)
    if ppo.micro_batch_tokens:
        length = config.dataset.max_prompt_tokens + config.generation.max_new_tokens
        rows = max(1, min(rows, ppo.micro_batch_tokens // length))
    return Hand(mine, rows)


def own_critic(config: PPORun) -> bool:
    return config.ppo.estimator == "gae" and config.ppo.critic == "own"


def ppo(config: PPORun, facts: Facts) -> Iterator[Item]:
    ppo, model, adapter = config.ppo, facts.model, numbers(config, facts)
    yield from trained("policy", adapter, config, facts)
    if facts.reference:
        yield frozen("ref", adapter)
    for role in facts.scorers:
        yield frozen(role, adapter)
    if ppo.ema_decay:
        yield frozen("ema", adapter)
    critic = ppo.estimator == "gae"
    own = own_critic(config)
    if critic:
        yield from trained("critic", (adapter if own else 0) + model.hidden + 1, config, facts)
    answers = math.ceil(ppo.batch_size * ppo.samples_per_prompt / facts.ranks)
    whole = Batch(answers, config.dataset.max_prompt_tokens, config.generation.max_new_tokens)
    yield from rollout(facts, whole)
    rows = hand(config, facts).rows
    batch = replace(whole, rows=rows)
    if facts.scorers:
        yield scoring(facts, batch)
    forward = forward_of(config, facts, train=False)
    positions = rows * batch.answer
    states = positions * model.hidden
    yield from micro_batch(model, forward, batch, *our_logits(facts, positions))
    if critic:  # the head reads in float32
        yield Item("critic", KEPT, states * FLOAT, TRAIN)
    if own:
        kept = activations.kept(model, forward, rows, batch.length)
        yield Item("critic", KEPT, kept, TRAIN)


def answering(config: EvalRun | PreferRun, facts: Facts) -> Iterator[Item]:
    adapter = numbers(config, facts)
    yield frozen("policies", 2 * adapter)  # the one that answers, and the reference
    for role in facts.scorers:
        yield frozen(role, adapter)
    batch = Batch(EVAL_ROWS, config.dataset.max_prompt_tokens, config.generation.max_new_tokens)
    yield from rollout(facts, batch)
    chunk, _ = our_logits(facts, batch.rows * batch.answer)
    yield Item("policy", LOGITS, chunk, (SCORE,))
    if facts.scorers:
        yield scoring(facts, batch)
