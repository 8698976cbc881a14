"""How far a policy of an evaluation is from SFT: KL and log-ratios, over the whole vocabulary at temperature 1.

Of a policy that ILQL's Q steers, it is the distribution that is really sampled from, softmax(logits + beta (Q - V)).
Of best-of-n nothing of the kind can be measured, since its distribution over answers is no product of one over tokens
that anybody could write down: there is the analytic bound (algorithms.kl.best_of_n_kl).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_exp.algorithms.kl import best_of_n_kl, full_kl
from rlhf_exp.algorithms.logits import rows_at_once
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.rollout.engine import Adjust, Rollout
from rlhf_exp.rollout.scoring import Answers, answers, by_length, chosen, hidden_before
from rlhf_exp.stages.context import ROWS, Context


@torch.no_grad()
def kl_to_sft(
    context: Context, roles: Roles, role: str | None, rollout: Rollout, adjust: Adjust | None = None
) -> float:
    """KL(policy || SFT) in nats an answer: exact at every visited position, untruncated, temperature 1.

    adjust: what steers the policy's decoding. The mean over answers of a sum over positions: it has less variance
    than log-ratios of the sampled tokens.
    """
    total = 0.0
    for _, ours, theirs in _logits(context, roles, role, rollout, adjust):
        total += float(full_kl(ours, theirs).sum())
    return total / len(rollout.prompts)


@torch.no_grad()
def log_ratio_to_sft(
    context: Context, roles: Roles, role: str | None, rollout: Rollout, adjust: Adjust | None = None
) -> float:
    """Mean over the answers, whoever chose them, of log policy(answer) - log SFT(answer), in nats."""
    total = 0.0
    for targets, ours, theirs in _logits(context, roles, role, rollout, adjust):
        both = (logits.float().log_softmax(dim=-1).gather(1, targets[:, None]) for logits in (ours, theirs))
        total += float(next(both).sum() - next(both).sum())
    return total / len(rollout.prompts)


def best_of_n_to_sft(
    n: int,
    context: Context,
    roles: Roles,
    role: str | None,
    rollout: Rollout,
    adjust: Adjust | None = None,
    of_sft: bool = False,
) -> float:
    """What KL(best of n of the policy || SFT) is at most, in nats an answer; rollout: the best answers.

    KL(best || SFT) = KL(best || policy) + E_best[log policy / SFT]: the first is at most log n - (n - 1) / n, the
    second is measured on the answers that were the best, and 0 where the policy is SFT itself (of_sft).
    """
    bound = best_of_n_kl(n)
    return bound if of_sft else bound + log_ratio_to_sft(context, roles, role, rollout, adjust)


def _logits(
    context: Context, roles: Roles, role: str | None, rollout: Rollout, adjust: Adjust | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(targets [c], the policy's logits [c, V], SFT's) of all positions whose token was chosen, some at a time."""
    ref, base = BASE, roles.base
    if (sft := context.adapter("sft")) is not None:
        ref = "ref"
        roles.load(ref, sft)
    size = rows_at_once(base.output_layer[0])
    for rows in by_length(rollout, range(len(rollout.prompts)), ROWS):
        batch = answers(rollout, rows, base)
        both = [chosen(hidden_before(roles, name, batch), batch) for name in (role, ref)]
        layer = base.output(both[0].dtype)
        for targets, ours, theirs in zip(*(x.split(size) for x in (_targets(batch), *both)), strict=True):
            logits = layer(ours)
            yield targets, logits if adjust is None else logits.float() + adjust(ours), layer(theirs)
    if ref is not BASE:
        roles.remove(ref)


def _targets(batch: Answers) -> Tensor:
    return chosen(batch.targets, batch)
