"""Forwards over finished answers: hidden states at the answers' positions, and what is read off them.

Prompt and answer are joined and padded on the right: under causal attention a real token never sees that
padding, so there is no mask to build and no position ids to shift, and the attention kernel's causal path applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms.kl import full_kl
from rlhf_exp.algorithms.logits import rows_at_once
from rlhf_exp.algorithms.logprob import LinearLogprobs, linear_logprobs
from rlhf_exp.algorithms.repetition import Repetition
from rlhf_exp.algorithms.support import Support
from rlhf_exp.data.collate import grouped, right_pad
from rlhf_exp.model.base import Base
from rlhf_exp.model.roles import Roles
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.sampler import records
from rlhf_exp.rollout.texts import forbidden
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
    chosen: Tensor | None = None  # bool[N], False at an EOS that a stop text put there; None: all are samples

    @property
    def steps(self) -> Tensor:
        """bool[b, T], True at the tokens that the policy chose: `mask` without an EOS that a stop text put there.

        There is one in every row: a stop text has a token.
        """
        return self.mask if self.chosen is None else self.mask.masked_scatter(self.mask, self.chosen)


def answers(rollout: Rollout, rows: Sequence[int], base: Base) -> Answers:
    """Collate some rows of a rollout."""
    width = max(len(response) for response in rollout.responses)
    prompts = [len(rollout.prompts[row]) for row in rows]
    responses = [rollout.responses[row] for row in rows]
    ids, _ = right_pad([rollout.prompts[row] + rollout.responses[row] for row in rows], base.pad_id)
    mask = torch.arange(width)[None, :] < torch.tensor([len(r) for r in responses])[:, None]
    row, first = mask.nonzero(as_tuple=True)
    targets = torch.tensor([token for response in responses for token in response])
    supports, stops = rollout.supports, rollout.stops
    device = base.device
    chosen = None
    if stops is not None and any(stops[i] is not None for i in rows):
        last = torch.tensor(
            [len(r) - 1 if stops[i] is not None else -1 for i, r in zip(rows, responses, strict=True)]
        )
        chosen = (first != last[row]).to(device)
    return Answers(
        rows=torch.tensor(list(rows), device=device),
        ids=ids.to(device),
        mask=mask.to(device),
        before=(row.to(device), (first + torch.tensor(prompts)[row] - 1).to(device)),
        targets=targets.to(device),
        first=first.to(device),
        support=None if supports is None else _to(Support.concat([supports[i] for i in rows]), device),
        chosen=chosen,
    )


def _to(support: Support, device: torch.device) -> Support:
    return Support(support.ids.to(device), support.counts.to(device))


def by_length(rollout: Rollout, rows: Sequence[int], size: int, tokens: int = 0) -> list[list[int]]:
    """Rows in groups of at most `size` (and, padded, `tokens` tokens; 0: no limit), similar lengths together so that
    little padding is computed."""
    return _groups(rollout, _sorted(rollout, rows), size, tokens)


def dealt(rollout: Rollout, rows: Sequence[int], size: int, tokens: int = 0) -> list[list[int]]:
    """`by_length`, on several ranks each rank's own groups, in turn: `distributed.turns` goes through this rank's."""
    return distributed.shares(_sorted(rollout, rows), lambda hand: _groups(rollout, hand, size, tokens))


def _sorted(rollout: Rollout, rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (_length(rollout, row), row))


def _length(rollout: Rollout, row: int) -> int:
    return len(rollout.prompts[row]) + len(rollout.responses[row])


def _groups(rollout: Rollout, rows: Sequence[int], size: int, tokens: int) -> list[list[int]]:
    return grouped(rows, [_length(rollout, row) for row in rows], size, tokens)


def hidden_before(roles: Roles, role: str | None, batch: Answers) -> Tensor:
    """Hidden states [N, d] from which `role` predicts each answer token."""
    return roles.trunk(role, batch.ids)[batch.before]


def chosen(x: Tensor, batch: Answers) -> Tensor:
    """Of `x` [N, ...] the positions whose token the policy chose: all but an EOS after a stop text."""
    return x if batch.chosen is None else x[batch.chosen]


def answer_logprobs(
    base: Base,
    hidden: Tensor,
    batch: Answers,
    generation: Generation,
    entropy_gradient: bool = False,
    entropy: bool = True,
) -> LinearLogprobs:
    """Log-probs [N] of the answer tokens under the distribution they were sampled from.

    Repetition penalty, forbidden tokens, temperature and the recorded support are those of the rollout, whichever
    role `hidden` [N, d] comes from: old, new and reference log-probs are then over the same tokens. An EOS that a
    stop text put there was certain: log-prob 0, entropy 0. generation.logprob_mode=raw replays nothing but that.
    Without `entropy` (and its gradient) there is None, for a fifth less time.
    """
    if batch.chosen is None:
        return _chosen_logprobs(base, hidden, batch, generation, entropy_gradient, entropy)
    part = batch._replace(
        before=(batch.before[0][batch.chosen], batch.before[1][batch.chosen]),
        targets=batch.targets[batch.chosen],
        first=batch.first[batch.chosen],
        support=None if batch.support is None else batch.support.select(batch.chosen),
    )
    found = _chosen_logprobs(base, hidden[batch.chosen], part, generation, entropy_gradient, entropy)

    def with_certain(x: Tensor | None, fill: float) -> Tensor | None:
        return None if x is None else x.new_full(batch.targets.shape, fill).masked_scatter(batch.chosen, x)

    return LinearLogprobs(*(with_certain(x, fill) for x, fill in zip(found, (0, 0, 1), strict=True)))


def _chosen_logprobs(
    base: Base,
    hidden: Tensor,
    batch: Answers,
    generation: Generation,
    entropy_gradient: bool,
    entropy: bool,
) -> LinearLogprobs:
    weight, bias = base.output_layer
    wanted = {"entropy_gradient": entropy_gradient, "entropy": entropy, "layer": base.output(hidden.dtype)}
    if generation.logprob_mode == "raw":
        return linear_logprobs(hidden, weight, bias, batch.targets, **wanted)
    suppressed, repetition = None, None
    limits = forbidden(generation, base.tokenizer, base.eos_id)
    if limits and not records(generation):  # the support leaves them out by itself
        ends = torch.tensor(list(limits.values()), device=batch.first.device)
        suppressed = (batch.first[:, None] < ends, list(limits))
    if generation.repetition_penalty != 1:
        row, place = batch.before
        repetition = Repetition(generation.repetition_penalty, batch.ids, row, place + 1)
    return linear_logprobs(
        hidden,
        weight,
        bias,
        batch.targets,
        generation.temperature,
        batch.support,
        suppressed,
        repetition=repetition,
        **wanted,
    )


def untruncated_kl(base: Base, hidden: Tensor, ref_hidden: Tensor) -> Tensor:
    """KL(policy || ref) [N] in nats at each position, over the whole vocabulary at temperature 1, exact.

    Summed over an answer and averaged over answers it estimates the KL of the untruncated distributions with less
    variance than log-prob differences of the sampled tokens.
    """
    chunk, layer = rows_at_once(base.output_layer[0]), base.output(hidden.dtype)
    parts = []
    for p, q in zip(hidden.split(chunk), ref_hidden.split(chunk), strict=True):
        parts.append(full_kl(layer(p), layer(q)))
    return torch.cat(parts)
