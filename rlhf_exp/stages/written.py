"""Answers that nobody sampled, in the form of a rollout: what scores or reads samples takes them as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_exp.rollout.engine import Rollout


def written(prompts: Sequence[list[int]], responses: Sequence[list[int]], eos_id: int) -> Rollout:
    """prompts and responses: token ids a row. An answer that was cut has no EOS: it did not end."""
    ended = [bool(ids) and ids[-1] == eos_id for ids in responses]
    return Rollout(list(prompts), list(responses), ended, [torch.zeros(0)] * len(ended), None)


def rows_of(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Some rows of it: what collates a batch looks at every answer it is given, and pads to the longest."""
    lists = ([column[row] for row in rows] for column in rollout[:4])
    return Rollout(*lists, None)
