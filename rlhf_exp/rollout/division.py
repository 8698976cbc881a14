"""Sampling on several ranks: each answers its prompts, all have all answers afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms.support import Support
from rlhf_exp.model.base import Base
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.schema import Generation


class Packed(NamedTuple):
    """A rollout's answers as they travel: a tensor for all rows where the rollout has one a row."""

    responses: list[list[int]]
    ended: list[bool]
    logprobs: Tensor  # float32[N] of all answers' tokens
    supports: tuple[Tensor, Tensor] | None  # ids, and how many of each token
    stops: list[int | None] | None
    masses: Tensor | None  # float32[N]


def generate(
    on_one: Callable[..., Rollout],
    base: Base,
    role: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    generation: Generation,
    adjust: Any,
) -> Rollout:
    """As engine.generate; on_one: what it does on one rank. What goes wrong on any rank is raised on all.

    Rows are dealt in order of length, so that the ranks have about as much to read. Where there are fewer rows than
    ranks, the last ranks have none.
    """
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    hands = [order[rank :: distributed.world_size()] for rank in range(distributed.world_size())]
    own = hands[distributed.rank()]

    def answer() -> Packed | None:
        if not own:
            if base.in_shards:
                with base.whole():  # the others need this rank's part
                    return None
            return None
        some = [prompts[row] for row in own], [keys[row] for row in own]
        return pack(on_one(base, role, *some, generation, adjust))

    parts = distributed.everywhere(answer)
    return joined(prompts, [(hand, part) for hand, part in zip(hands, parts, strict=True) if part])


def pack(rollout: Rollout) -> Packed:
    supports = None
    if rollout.supports is not None:
        whole = Support.concat(rollout.supports)
        supports = whole.ids.cpu(), whole.counts.cpu()
    masses = None if rollout.masses is None else torch.cat(rollout.masses)
    logprobs = torch.cat(rollout.logprobs).cpu()
    return Packed(rollout.responses, rollout.ended, logprobs, supports, rollout.stops, masses)


def joined(prompts: Sequence[Sequence[int]], parts: Sequence[tuple[list[int], Packed]]) -> Rollout:
    """The rollout of all prompts from those of some rows each."""
    columns: list[dict[int, Any]] = [{} for _ in Rollout._fields[1:]]
    for rows, part in parts:
        lengths = [len(response) for response in part.responses]
        supports = stops = masses = [None] * len(rows)
        if part.supports is not None:
            ids, counts = part.supports
            each = counts.split(lengths)
            sizes = [int(count.sum()) for count in each]
            supports = [Support(*pair) for pair in zip(ids.split(sizes), each, strict=True)]
        if part.stops is not None:
            stops = part.stops
        if part.masses is not None:
            masses = part.masses.split(lengths)
        found = (part.responses, part.ended, part.logprobs.split(lengths), supports, stops, masses)
        for column, values in zip(columns, found, strict=True):
            column.update(zip(rows, values, strict=True))
    responses, ended, logprobs, supports, stops, masses = (
        [column[row] for row in range(len(prompts))] for column in columns
    )
    first = parts[0][1]
    return Rollout(
        [list(prompt) for prompt in prompts],
        responses,
        ended,
        logprobs,
        None if first.supports is None else supports,
        None if first.stops is None else stops,
        None if first.masses is None else masses,
    )
