"""What the stages that train on written answers hold: sft, reward, dpo, kto, ilql."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlhf_exp.memory import activations
from rlhf_exp.memory.activations import FLOAT, Forward
from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.memory.counted import BACKWARD, FORWARD, KEPT, LOGITS, PASSING, TRAIN, Batch, Facts, Item
from rlhf_exp.memory.logits import our_logits, trl_logits
from rlhf_exp.memory.weights import frozen, numbers, trained
from rlhf_exp.model import shapes
from rlhf_exp.schema import DPORun, ILQLRun, KTORun, PPORun, RewardRun, Run, SFTRun


def forward_of(config: Run, facts: Facts, *, padded: bool = False, train: bool = True) -> Forward:
    """train: whether LoRA's dropout is on, which PPO and the like leave out."""
    full = config.lora.full and isinstance(config, SFTRun)
    return Forward(
        width=facts.width,
        device=facts.device,
        targets=facts.targets,
        rank=config.lora.r,
        dropout=train and config.lora.dropout > 0 and not full,
        full=full,
        padded=padded,
        recomputed=config.memory.gradient_checkpointing,
    )


def micro_rows(config: Run, facts: Facts, batch: int) -> int:
    """Rows (pairs) of a forward on one rank, of `batch` an optimiser step; 0 (as many as fit) counts as all."""
    settings = config.ppo if isinstance(config, PPORun) else config.train
    mine = math.ceil(batch / facts.ranks)
    return min(mine, settings.micro_batch_size or mine)


def pairs(config: RewardRun, facts: Facts) -> int:
    """Of a forward on one rank: by their number, and by their tokens."""
    found, limit = micro_rows(config, facts, config.train.batch_size), config.reward.micro_batch_tokens
    prompt, answer = written(config)
    return max(1, min(found, limit // (prompt + 2 * answer))) if limit else found


def written(config: Run) -> tuple[int, int]:
    """Tokens of the longest prompt and answer of the data."""
    return config.dataset.max_prompt_tokens, config.dataset.max_response_tokens


def micro_batch(
    model: Architecture, forward: Forward, batch: Batch, logits: float, whole: float
) -> Iterator[Item]:
    """Activations of a micro-batch, what the loss needs beside them (whole: unchunked), and then the backward."""
    yield Item("policy", KEPT, activations.kept(model, forward, batch.rows, batch.length), TRAIN)
    yield Item("policy", LOGITS, logits, (FORWARD,), whole=whole)
    yield Item("policy", PASSING, activations.backward(model, forward.width, batch.tokens), (BACKWARD,))


def sft(config: SFTRun, facts: Facts) -> Iterator[Item]:
    model, forward = facts.model, forward_of(config, facts, padded=True)
    if not config.lora.full:
        yield from trained("policy", numbers(config, facts), config, facts)
    batch = Batch(micro_rows(config, facts, config.train.batch_size), *written(config))
    yield from micro_batch(model, forward, batch, *trl_logits(facts, batch))


def reward(config: RewardRun, facts: Facts) -> Iterator[Item]:
    model, reward = facts.model, config.reward
    forward = forward_of(config, facts)
    yield from trained("reward", numbers(config, facts) + model.hidden + 1, config, facts)
    prompt, answer = written(config)
    rows = pairs(config, facts)
    compared = answer if reward.loss == "token_wise" else 1
    heads = 2 * rows * compared * model.hidden * (facts.width + FLOAT)
    if reward.share_prompts:
        kept = activations.kept_pairs(model, forward, rows, prompt, answer, answer)
        tokens = rows * (prompt + 2 * answer)
    else:
        tokens = 2 * rows * (prompt + answer)
        kept = activations.kept(model, forward, 2 * rows, prompt + answer)
    yield Item("reward", KEPT, kept + heads, TRAIN)
    yield Item("reward", PASSING, activations.backward(model, forward.width, tokens), (BACKWARD,))


def direct(config: DPORun | KTORun, facts: Facts) -> Iterator[Item]:
    adapter = numbers(config, facts)
    yield from trained("policy", adapter, config, facts)
    if facts.reference:
        yield frozen("ref", adapter)
    rows = 2 * micro_rows(config, facts, config.train.batch_size)
    batch = Batch(rows, *written(config))
    forward = forward_of(config, facts, padded=True, train=False)
    yield from micro_batch(facts.model, forward, batch, *trl_logits(facts, batch))


def ilql(config: ILQLRun, facts: Facts) -> Iterator[Item]:
    model, adapter = facts.model, numbers(config, facts)
    yield from trained("policy", adapter, config, facts)
    q_head = shapes.q_head(config.ilql.head, model.hidden, model.vocabulary)
    value = 2 * model.hidden * model.hidden if config.ilql.head != "linear" else model.hidden
    yield from trained("Q and V heads", 2 * q_head + value, config, facts)
    yield frozen("lagging Q heads", 2 * q_head)
    for role in facts.scorers:
        yield frozen(role, adapter)
    rows = micro_rows(config, facts, config.train.batch_size)
    batch = Batch(rows, *written(config))
    forward = forward_of(config, facts, train=False)
    positions = rows * batch.answer
    features = 3 * positions * model.hidden * FLOAT * (3 if config.ilql.head != "linear" else 1)
    # of a chunk's Q, and the gradient of a head's weight before it is added
    q, whole = (bytes_ + q_head * FLOAT for bytes_ in our_logits(facts, positions))
    kept = activations.kept(model, forward, rows, batch.length) + features
    yield Item("policy", KEPT, kept, TRAIN)
    yield Item("Q and V heads", LOGITS, q, TRAIN, whole=whole)
    yield Item("policy", PASSING, activations.backward(model, forward.width, batch.tokens), (BACKWARD,))
