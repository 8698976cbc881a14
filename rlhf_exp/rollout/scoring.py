"""Forwards over finished answers: hidden states at the answers' positions, and what is read off them.

Prompt and answer are joined and padded on the right: under causal attention a real token never sees that
padding, so there is no mask to build and no position ids to shift, and the attention kernel's causal path applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.kl import full_kl
from rlhf_exp.algorithms.logprob import LOGIT_BUDGET, LinearLogprobs, linear_logprobs
from rlhf_exp.algorithms.support import Support
from rlhf_exp.data.collate import right_pad
from rlhf_exp.model.base import Base
from rlhf_exp.model.roles import Roles
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.sampler import restricts
from rlhf_exp.schema import Generation


class Answers(NamedTuple):
    """b rows of a rollout, padded together; N is the number of their answer tokens, in row-major order."""

    rows: Tensor  # int64[b], their places in the rollout
    ids: Tensor  # int64[b, L], prompt + answer, right-padded
    mask: Tensor  # bool[b, T], True at answer tokens; T is the longest answer of the whole rollout
    before: tuple[
        Tensor, Tensor
    ]  # (row, position) int64[N] of the hidden state that predicts each answer token
    targets: Tensor  # int64[N], the answer tokens
    first: Tensor  # int64[N], how many answer tokens precede each
    support: Support | None


def answers(rollout: Rollout, rows: Sequence[int], base: Base) -> Answers:
    """Collate some rows of a rollout."""
    width = max(len(response) for response in rollout.responses)
    prompts = [len(rollout.prompts[row]) for row in rows]
    responses = [rollout.responses[row] for row in rows]
    ids, _ = right_pad([rollout.prompts[row] + rollout.responses[row] for row in rows], base.pad_id)
    mask = torch.arange(width)[None, :] < torch.tensor([len(r) for r in responses])[:, None]
    row, first = mask.nonzero(as_tuple=True)
    targets = torch.tensor([token for response in responses for token in response])
    supports = rollout.supports
    device = base.device
    return Answers(
        rows=torch.tensor(list(rows), device=device),
        ids=ids.to(device),
        mask=mask.to(device),
        before=(row.to(device), (first + torch.tensor(prompts)[row] - 1).to(device)),
        targets=targets.to(device),
        first=first.to(device),
        support=None if supports is None else _to(Support.concat([supports[i] for i in rows]), device),
    )


def _to(support: Support, device: torch.device) -> Support:
    return Support(support.ids.to(device), support.counts.to(device))


def by_length(rollout: Rollout, rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows in groups of at most `size`, similar lengths together so that little padding is computed."""
    ordered = sorted(rows, key=lambda row: (len(rollout.prompts[row]) + len(rollout.responses[row]), row))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def hidden_before(roles: Roles, role: str | None, batch: Answers) -> Tensor:
    """Hidden states [N, d] from which `role` predicts each answer token."""
    return roles.trunk(role, batch.ids)[batch.before]


def answer_logprobs(base: Base, hidden: Tensor, batch: Answers, generation: Generation) -> LinearLogprobs:
    """Log-probs [N] of the answer tokens under the distribution they were sampled from.

    Temperature, the forbidden EOS and the recorded support are those of the rollout, whichever role `hidden`
    [N, d] comes from: old, new and reference log-probs are then over the same tokens.
    """
    weight, bias = base.output_layer
    suppressed = None
    if generation.min_new_tokens > 0 and not restricts(generation):  # the support leaves EOS out by itself
        suppressed = (batch.first < generation.min_new_tokens, [base.eos_id])
    return linear_logprobs(
        hidden, weight, bias, batch.targets, generation.temperature, batch.support, suppressed
    )


def untruncated_kl(base: Base, hidden: Tensor, ref_hidden: Tensor) -> Tensor:
    """KL(policy || ref) [N] in nats at each position, over the whole vocabulary at temperature 1, exact.

    Summed over an answer and averaged over answers it estimates the KL of the untruncated distributions with less
    variance than log-prob differences of the sampled tokens.
    """
    weight, bias = base.output_layer
    chunk = max(1, LOGIT_BUDGET // weight.shape[0])
    parts = []
    for p, q in zip(hidden.split(chunk), ref_hidden.split(chunk), strict=True):
        logits_p, logits_q = (torch.nn.functional.linear(x, weight.to(x.dtype), bias).float() for x in (p, q))
        parts.append(full_kl(logits_p, logits_q))
    return torch.cat(parts)
