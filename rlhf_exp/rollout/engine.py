"""Cached decoding: prompts in, sampled answers out; finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.support import Support
from rlhf_exp.data.collate import left_pad
from rlhf_exp.model.base import Base
from rlhf_exp.rollout.noise import uniform
from rlhf_exp.rollout.sampler import draw, kept, restricts, scaled_logits
from rlhf_exp.schema import Generation

SHRINK_AT = 0.75  # of the rows still open: below, the cache is copied without the finished ones


class Rollout(NamedTuple):
    """Sampled answers of B rows, in the order of the prompts."""

    prompts: list[list[int]]
    responses: list[list[int]]  # sampled ids, EOS included where the answer ended
    ended: list[bool]  # whether EOS came within max_new_tokens
    logprobs: list[Tensor]  # float32[T] a row, under the distribution that was sampled from
    supports: list[Support] | None  # the kept tokens of each position, where top-k or top-p is on


def spoken(rollout: Rollout) -> list[list[int]]:
    """The responses' ids without EOS."""
    pairs = zip(rollout.responses, rollout.ended, strict=True)
    return [response[:-1] if ended else response for response, ended in pairs]


class _Row:
    """One answer while it is written."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Tensor] = []
        self.kept: list[Tensor] = []

    def support(self) -> Support:
        ids = torch.cat(self.kept) if self.kept else torch.zeros(0, dtype=torch.int32)
        return Support(ids, torch.tensor([len(k) for k in self.kept], dtype=torch.int64))


@torch.no_grad()
def generate(
    base: Base,
    role: Callable[[], AbstractContextManager[None]],
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    generation: Generation,
) -> Rollout:
    """Sample one answer to each prompt.

    role: a context manager in which the base computes as the policy, e.g. `lambda: roles.use("policy")`. keys: of
    `noise.row_key`, one a row: they alone decide the noise. Prompts must not be empty.
    """
    rows = [_Row() for _ in prompts]
    with role():
        _decode(
            base, rows, prompts, torch.tensor(list(keys), dtype=torch.int64, device=base.device), generation
        )
    eos = base.eos_id
    return Rollout(
        [list(prompt) for prompt in prompts],
        [row.tokens for row in rows],
        [bool(row.tokens) and row.tokens[-1] == eos for row in rows],
        [torch.stack(row.logprobs) for row in rows],
        [row.support() for row in rows] if restricts(generation) else None,
    )


def _decode(
    base: Base, rows: list[_Row], prompts: Sequence[Sequence[int]], keys: Tensor, generation: Generation
) -> None:
    from transformers import DynamicCache

    weight, bias = base.output_layer
    ids, mask = (x.to(base.device) for x in left_pad(prompts, base.pad_id))
    cache = DynamicCache(config=base.model.config)
    # where each row of the batch belongs, whether it still writes, and how long its prompt is
    index = torch.arange(len(rows), device=base.device)
    is_open = torch.ones(len(rows), dtype=torch.bool, device=base.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for step in range(generation.max_new_tokens):
        hidden = base.trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
        tokens = _sample(logits, keys, step, generation, base.eos_id, rows, index, is_open)
        is_open = is_open & (tokens != base.eos_id)
        if not is_open.any():
            return
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if is_open.float().mean() <= SHRINK_AT:
            stay = is_open.nonzero().squeeze(1)
            cache.batch_select_indices(stay)
            ids, positions, mask, keys, index = (x[stay] for x in (ids, positions, mask, keys, index))
            is_open = is_open[stay]


def _sample(
    logits: Tensor,
    keys: Tensor,
    step: int,
    generation: Generation,
    eos_id: int,
    rows: list[_Row],
    index: Tensor,
    is_open: Tensor,
) -> Tensor:
    """Draw a token for every row of the batch and write it down for the open ones."""
    logits = scaled_logits(logits, generation, step, eos_id)
    keep = None
    if restricts(generation):
        keep = kept(logits, generation.top_k, generation.top_p)
        logits = logits.masked_fill(~keep, -torch.inf)
    tokens = draw(logits, uniform(keys, step))
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    for i, (row, token) in enumerate(zip(index.tolist(), tokens.tolist(), strict=True)):
        if is_open[i]:
            rows[row].tokens.append(token)
            rows[row].logprobs.append(logprobs[i].cpu())
            if keep is not None:
                rows[row].kept.append(keep[i].nonzero().squeeze(1).to(torch.int32).cpu())
    return tokens
