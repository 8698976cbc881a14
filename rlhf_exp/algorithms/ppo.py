"""The two losses of PPO.

Each field of a result, `ratio_max` apart, is (sum over the tokens of this call of weight * quantity) /
denominator: a share of the global batch. Added over micro-batches and data-parallel ranks the shares give
exactly what one large batch gives: the mean over tokens when denominator = all tokens that count, the mean
of sequence means when weights = `sequence_weights(mask)` and denominator = all sequences. (Data-parallel
engines that average gradients over ranks need the loss times the number of ranks.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.kl import kl_divergence_estimate
from rlhf_exp.algorithms.masked import masked_sum, masked_var
from rlhf_exp.algorithms.shapes import at_least_float32, check_denominator, check_shapes

# of log-ratios: beyond, exp overflows and inf * 0 would send NaN through the gradient; verl's bound too
FARTHEST = 20.0


class PolicyLoss(NamedTuple):
    """Scalars that add over micro-batches, but for `ratio_max`: maximum. Only `loss` has a gradient."""

    loss: Tensor
    approxkl: Tensor  # k3 estimate of KL(old || new), in nats per token
    clipfrac: Tensor  # tokens whose gradient was cut off by the clip
    ratio_mean: Tensor  # new / old probability; 1 in expectation
    ratio_max: Tensor  # 0 when no token counts


class ValueLoss(NamedTuple):
    """Scalars that add over micro-batches; only `loss` has a gradient."""

    loss: Tensor
    clipfrac: Tensor  # tokens where the clipped error was the larger one


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange_low: float,
    cliprange_high: float,
    denominator: float | Tensor,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """-L^CLIP = sum max(-A ratio, -A clip(ratio, 1 - cliprange_low, 1 + cliprange_high)) / denominator.

    Schulman et al. 2017 (arXiv:1707.06347) eq. 7, ratio = exp(logprobs - old_logprobs); two bounds as in Yu
    et al. 2025 (DAPO, arXiv:2503.14476, Clip-Higher). `dual_clip` c > 1 also bounds the loss of a token
    with A < 0 at -c A (Ye et al. 2020, arXiv:1912.09729, dual-clip PPO). logprobs, old_logprobs,
    advantages, weights [...], mask bool[...]. Log-ratios are bounded at +-FARTHEST, without a gradient beyond.
    `approxkl` is Schulman's k3, (ratio - 1) - log ratio
    ("Approximating KL Divergence", 2020).
    """
    check_shapes(
        logprobs=(logprobs, "..."),
        old_logprobs=(old_logprobs, "..."),
        advantages=(advantages, "..."),
        mask=(mask, "..."),
    )
    check_denominator(denominator)
    # Padding is cleared here, ahead of everything: this is also where NaN in the backward ends.
    log_ratio = torch.where(mask, at_least_float32(logprobs) - at_least_float32(old_logprobs), 0)
    log_ratio = log_ratio.clamp(-FARTHEST, FARTHEST)
    advantages = at_least_float32(advantages)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange_low, 1 + cliprange_high)
    losses = torch.maximum(unclipped, clipped)
    cut = clipped > unclipped
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}")
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (losses > bound)
        losses, cut = torch.where(beyond, bound, losses), cut | beyond
    with torch.no_grad():
        approxkl = _share(
            kl_divergence_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3"), mask, weights, denominator
        )
        clipfrac = _share(cut.to(ratio.dtype), mask, weights, denominator)
        ratio_mean = _share(ratio, mask, weights, denominator)
        # The appended 0 lets a rank without sequences take part.
        ratio_max = torch.cat([torch.where(mask, ratio, 0).flatten(), ratio.new_zeros(1)]).max()
    return PolicyLoss(_share(losses, mask, weights, denominator), approxkl, clipfrac, ratio_mean, ratio_max)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float | None,
    denominator: float | Tensor,
    weights: Tensor | None = None,
) -> ValueLoss:
    """0.5 sum max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / denominator, c = cliprange_value.

    Value clipping of PPO2: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy
    Optimization", core detail 9; the factor 0.5 as in that code. No clip when `cliprange_value` is None.
    values, old_values, returns, weights [...], mask bool[...]; the bound has the unit of the values.
    """
    check_shapes(
        values=(values, "..."), old_values=(old_values, "..."), returns=(returns, "..."), mask=(mask, "...")
    )
    check_denominator(denominator)
    values, old_values, returns = (
        torch.where(mask, at_least_float32(x), 0) for x in (values, old_values, returns)
    )
    unclipped = (values - returns).square()
    if cliprange_value is None:
        clipped = unclipped
    else:
        # Not old + clamp(V - old): its rounding differs from V inside the range and would count as clipped.
        near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        clipped = (near - returns).square()
    losses = 0.5 * torch.maximum(unclipped, clipped)
    cut = (clipped > unclipped).to(losses.dtype)
    return ValueLoss(_share(losses, mask, weights, denominator), _share(cut, mask, weights, denominator))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens that count [...]: 1 is perfect, 0 a constant.

    Does not add over micro-batches: give it a whole batch, or combine `Moments` of both variances. NaN or
    -inf when all returns are equal.
    """
    check_shapes(values=(values, "..."), returns=(returns, "..."), mask=(mask, "..."))
    values, returns = at_least_float32(values), at_least_float32(returns)
    return 1 - masked_var(returns - values, mask) / masked_var(returns, mask)


def _share(x: Tensor, mask: Tensor, weights: Tensor | None, denominator: float | Tensor) -> Tensor:
    """sum of weights * x over the tokens that count / denominator."""
    if weights is not None:
        check_shapes(weights=(weights, "..."), mask=(mask, "..."))
        x = x * weights
    return masked_sum(x, mask) / denominator
