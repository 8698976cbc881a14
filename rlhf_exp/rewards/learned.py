"""Scores of whole answers by a reward model: an adapter and a scalar head on the shared base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rlhf_exp.data.collate import right_pad
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
) -> list[float]:
    """Scores of whole sequences (prompt + answer + EOS, as the reward model was trained), `size` at a time.

    tell: is told how many are done so far.
    """
    device, pad_id = roles.base.device, roles.base.pad_id
    scores, done = [0.0] * len(sequences), 0
    for rows in _chunks(sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)), size):
        ids, lengths = (x.to(device) for x in right_pad([sequences[i] for i in rows], pad_id))
        for i, score in zip(rows, last_token_scores(roles, role, head, ids, lengths).tolist(), strict=True):
            scores[i] = score
        done += len(rows)
        tell(done)
    return scores


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
