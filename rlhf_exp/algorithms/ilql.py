"""Implicit language Q-learning: Q and V learned from a fixed data set, which then steer the decoding.

Snell et al. 2022 (ILQL, arXiv:2206.11871), on Kostrikov et al. 2021 (IQL, arXiv:2110.06169), whose losses are L_V,
L_Q and L_pi. A state is the prompt and the answer so far, an action is the next token. Q and V of a state are read
off the hidden state that predicts the token; after the last token of an answer there is no state, and V is 0 there.

Every loss is a sum over tokens / `denominator`, the number of tokens of the whole batch: micro-batches add up.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_exp.algorithms.logits import rows_at_once
from rlhf_exp.algorithms.masked import last_token, masked_sum
from rlhf_exp.algorithms.shapes import at_least_float32, check_denominator, check_shapes

MAX_WEIGHT = 100.0  # of a token in the AWAC loss, as in the code of IQL


def terminal_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Rewards [B, T]: the score [B] at the last token that counts in `mask` bool[B, T], 0 elsewhere.

    The last token is the action that ends the answer: EOS, or the last one that was kept of a cut answer.
    """
    check_shapes(scores=(scores, "B"), mask=(mask, "B T"))
    scores = at_least_float32(scores)
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device)
    return rewards.scatter(1, last_token(mask).unsqueeze(1), scores.unsqueeze(1))


@torch.no_grad()
def bellman_targets(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """r_t + gamma * V(s_{t+1}) [B, T], a constant; V is 0 after the last token; zero on padding.

    Of IQL's L_Q, the target of Q: the next state's V takes the place of a maximum over actions, so Q is never asked
    for tokens that the data do not have. rewards, values [B, T], mask bool[B, T] right-padded (ValueError if not:
    a gap would join two answers), gamma in [0, 1].
    """
    check_shapes(rewards=(rewards, "B T"), values=(values, "B T"), mask=(mask, "B T"))
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    gaps = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if gaps.any():
        raise ValueError(f"rows {gaps.nonzero().flatten().tolist()} of mask are not right-padded")
    following = F.pad(torch.where(mask, at_least_float32(values), 0)[:, 1:], (0, 1))
    return torch.where(mask, at_least_float32(rewards) + gamma * following, 0)


def bellman_loss(q: Tensor, targets: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """sum (targets - Q(s, a))^2 / denominator, IQL's L_Q. q, targets [...], mask bool[...]."""
    check_shapes(q=(q, "..."), targets=(targets, "..."), mask=(mask, "..."))
    check_denominator(denominator)
    q = torch.where(mask, at_least_float32(q), 0)
    return masked_sum((targets.detach() - q).square(), mask) / denominator


def expectile_loss(
    values: Tensor, q_target: Tensor, mask: Tensor, tau: float, denominator: float | Tensor
) -> Tensor:
    """sum |tau - 1(u < 0)| u^2 / denominator with u = Q_target(s, a) - V(s), IQL's L_V.

    tau = 0.5 is half the squared error: V becomes the mean of Q over the data's tokens. tau -> 1 makes it their
    maximum. values, q_target [...], mask bool[...]; q_target is a constant, the smaller of the twin target heads
    (Fujimoto et al. 2018, arXiv:1802.09477, section 4.2).
    """
    check_shapes(values=(values, "..."), q_target=(q_target, "..."), mask=(mask, "..."))
    check_denominator(denominator)
    if not 0 < tau < 1:
        raise ValueError(f"tau must lie in (0, 1), got {tau}")
    u = torch.where(mask, at_least_float32(q_target).detach() - at_least_float32(values), 0)
    return masked_sum((tau - (u < 0).to(u.dtype)).abs() * u.square(), mask) / denominator


class Taken(NamedTuple):
    """Both float32[N] or wider."""

    q: Tensor  # Q(s, a) of the taken tokens
    nll: Tensor  # -log softmax(Q(s, .))[a]: the conservative term


def taken_q(features: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor) -> Tensor:
    """Q(s, a) [N] of the taken tokens alone, without the other V - 1.

    features [N, k], weight [V, k], bias [V] or None, actions int64[N]. The product is taken in float32 or wider.
    """
    check_shapes(features=(features, "N k"), weight=(weight, "V k"), actions=(actions, "N"))
    q = (at_least_float32(features) * weight[actions]).sum(dim=1)
    return q if bias is None else q + bias[actions]


def taken_q_and_nll(
    features: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, chunk_size: int | None = None
) -> Taken:
    """Q(s, a) [N], and the conservative term log sum_a' exp Q(s, a') - Q(s, a) [N].

    The term is CQL's (Kumar et al. 2020, arXiv:2006.04779, CQL(H)) as ILQL has it: the cross-entropy of the taken
    token under softmax(Q). It lowers Q of tokens that the data do not have, which nothing else would.

    features [N, k], weight [V, k], bias [V] or None, actions int64[N]. `chunk_size` positions at once (by default
    `rows_at_once`): where there are several chunks, each is computed again in the backward, so that
    of [N, V] only [chunk_size, V] is ever held.
    """
    check_shapes(features=(features, "N k"), weight=(weight, "V k"), actions=(actions, "N"))
    if chunk_size is None:
        chunk_size = rows_at_once(weight)
    if len(features) <= chunk_size:
        return Taken(*_q_and_nll(features, weight, bias, actions))
    parts = [
        checkpoint(_q_and_nll, f, weight, bias, a, use_reentrant=False, preserve_rng_state=False)
        for f, a in zip(features.split(chunk_size), actions.split(chunk_size), strict=True)
    ]
    return Taken(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _q_and_nll(
    features: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor
) -> tuple[Tensor, Tensor]:
    q = at_least_float32(F.linear(features.to(weight.dtype), weight, bias))
    taken = q.gather(1, actions.unsqueeze(1)).squeeze(1)
    return taken, q.logsumexp(dim=1) - taken


def token_loss(losses: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """sum over the tokens that count / denominator: the conservative term of a batch. losses, mask bool [...]."""
    check_shapes(losses=(losses, "..."), mask=(mask, "..."))
    check_denominator(denominator)
    return masked_sum(losses, mask) / denominator


@torch.no_grad()
def awac_weights(q_target: Tensor, values: Tensor, beta: float, most: float = MAX_WEIGHT) -> Tensor:
    """min(exp(beta * (Q_target(s, a) - V(s))), most) [...], constants: 1 everywhere at beta = 0.

    Nair et al. 2020 (AWAC, arXiv:2006.09359); IQL's L_pi. This beta shapes the training of the policy's
    logits and has nothing to do with that of the decoding.
    """
    check_shapes(q_target=(q_target, "..."), values=(values, "..."))
    return (beta * (at_least_float32(q_target) - at_least_float32(values))).exp().clamp(max=most)


def awac_loss(logprobs: Tensor, weights: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """-sum weights * log pi(a | s) / denominator, IQL's L_pi; with weights of 1 the loss of SFT.

    logprobs, weights [...], mask bool[...].
    """
    check_shapes(logprobs=(logprobs, "..."), weights=(weights, "..."), mask=(mask, "..."))
    check_denominator(denominator)
    logprobs = torch.where(mask, at_least_float32(logprobs), 0)
    return -masked_sum(weights.detach() * logprobs, mask) / denominator


@torch.no_grad()
def polyak_update(targets: Iterable[Tensor], online: Iterable[Tensor], rate: float) -> None:
    """targets <- (1 - rate) * targets + rate * online, in place, tensor by tensor.

    Lillicrap et al. 2016 (DDPG, arXiv:1509.02971), algorithm 1. rate 1 copies.
    """
    for target, source in zip(targets, online, strict=True):
        target.lerp_(source, rate)


def decoding_bonus(q_target: Tensor, values: Tensor, beta: float) -> Tensor:
    """beta * (Q_target(s, .) - V(s)) [B, V], to be added to the policy's logits before anything else.

    So pi(a | s) is proportional to pi_b(a | s) * exp(beta * (Q(s, a) - V(s))): Snell et al. 2022, policy
    extraction. q_target [B, V], values [B]. V is the same for every token of a state and changes no probability; it
    keeps the numbers small. beta = 0 adds exactly 0.
    """
    check_shapes(q_target=(q_target, "B V"), values=(values, "B"))
    return beta * (at_least_float32(q_target) - at_least_float32(values).unsqueeze(1))
