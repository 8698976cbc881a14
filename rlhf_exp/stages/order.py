"""Which rows come when, from the seed and the step alone: a resume or another number of workers changes nothing."""

from __future__ import annotations

import torch

from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.noise import splitmix
from rlhf_exp.rollout.scoring import dealt
from rlhf_exp.schema import PPORun

Plan = list[list[list[list[int]]]]  # plan[epoch][minibatch][micro-batch] = rows


def batch_of(count: int, size: int, seed: int, step: int) -> list[int]:
    """The prompts of iteration `step` (from 1): consecutive pieces of one shuffle an epoch, from the seed alone."""
    places = range((step - 1) * size, step * size)
    orders = {epoch: _shuffle(count, seed, epoch) for epoch in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places]


def piece_of(count: int, size: int, seed: int, step: int) -> list[int]:
    """The rows of optimiser step `step` (from 1) in passes over `count` rows: of each pass the last may be smaller.

    As the Trainer of SFT cuts its epochs, so that an epoch is one pass whatever learns from it.
    """
    epoch, piece = divmod(step - 1, -(-count // size))
    return _shuffle(count, seed, epoch)[piece * size : (piece + 1) * size]


def minibatches(rollout: Rollout, config: PPORun, step: int) -> Plan:
    """Rows of every micro-batch of every minibatch of every epoch; on several ranks those of all, in turn."""
    ppo, count = config.ppo, len(rollout.prompts)
    size = count // ppo.minibatches
    plan = []
    for epoch in range(ppo.epochs):
        order = _shuffle(count, config.seed, step, epoch)
        pieces = [order[start : start + size] for start in range(0, count, size)]
        limits = ppo.micro_batch_size, ppo.micro_batch_tokens
        plan.append([dealt(rollout, piece, *limits) for piece in pieces])
    return plan


def _shuffle(count: int, seed: int, *keys: int) -> list[int]:
    for key in keys:
        seed = splitmix(seed ^ key)
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    return torch.randperm(count, generator=generator).tolist()
