"""Scores of whole answers by a reward model: an adapter and a scalar head on the shared base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.data.collate import grouped, right_pad
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles


def last_token_scores(
    roles: Roles, role: str | None, head: ScalarHead, ids: Tensor, lengths: Tensor
) -> Tensor:
    """The head's number at the last real token of each row [B]; ids int64[B, L] right-padded, lengths int64[B]."""
    hidden = roles.trunk(role, ids)
    return head(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])


@torch.no_grad()
def score_sequences(
    roles: Roles,
    role: str | None,
    head: ScalarHead,
    sequences: Sequence[Sequence[int]],
    size: int,
    tell: Callable[[int], None] = lambda done: None,
    tokens: int = 0,
) -> list[float]:
    """Scores of whole sequences (prompt + answer + EOS, as the reward model was trained), `size` at a time.

    tokens: of a forward, padding included, at most; 0: no limit.
    tell: is told how many are done so far. Several ranks share the sequences; all return all scores.
    """
    device, pad_id = roles.base.device, roles.base.pad_id
    scores: dict[int, float] = {}
    done = 0
    ordered = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    groups = distributed.shares(
        ordered, lambda hand: grouped(hand, [len(sequences[i]) for i in hand], size, tokens)
    )
    for rows, counts in distributed.turns(groups, roles.base.in_shards):
        ids, lengths = (x.to(device) for x in right_pad([sequences[i] for i in rows], pad_id))
        found = last_token_scores(roles, role, head, ids, lengths).tolist()
        if counts:
            scores |= zip(rows, found, strict=True)
        done += len(rows)
        tell(min(done * distributed.world_size(), len(sequences)))
    scores = distributed.union(scores)
    return [scores[i] for i in range(len(sequences))]
