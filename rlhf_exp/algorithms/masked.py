"""Sums, means and moments over the tokens that count.

Padding is removed with `torch.where` and never by multiplying: 0 * NaN is NaN, in the value and in the
gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.shapes import at_least_float32, check_shapes


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` [...] where `mask` bool[...] is True, over `dim` or all; bf16 and fp16 give float32."""
    check_shapes(x=(x, "..."), mask=(mask, "..."))
    return torch.where(mask, at_least_float32(x), 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` [...] where `mask` bool[...] is True, over `dim` or everything.

    NaN where no token counts, as `torch.mean` of nothing. Means of micro-batches with different numbers of
    tokens must not be averaged: combine sums and counts, or `Moments`.
    """
    return masked_sum(x, mask, dim) / mask.sum(dim)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = False) -> Tensor:
    """Variance of `x` [...] where `mask` bool[...] is True; divided by n, or by n - 1 when `unbiased`.

    Two passes (mean first), so a large mean costs no precision.
    """
    x = torch.where(mask, at_least_float32(x), 0)
    deviation = x - masked_mean(x, mask)
    return masked_sum(deviation.square(), mask) / (mask.sum() - int(unbiased))


class Moments(NamedTuple):
    """Count, sum and sum of squares of the tokens that count: float64 scalars on the device of the data.

    Addition merges them, so micro-batches, ranks and iterations combine exactly to the moments of the whole:
    `torch.stack(moments)` is one vector for an all-reduce (SUM), `Moments(*vector)` reads it back. float64
    keeps the subtraction in `var` accurate to about 1e-16 * mean^2; in float32 it would be lost at mean 1e4
    (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", the textbook algorithm).
    """

    count: Tensor
    total: Tensor
    total_sq: Tensor

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> "Moments":
        """Moments of `x` [...] where `mask` bool[...] is True: constants, without gradient."""
        x = x.detach().double()
        return cls(mask.sum().double(), masked_sum(x, mask), masked_sum(x.square(), mask))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets of tokens together."""
        return Moments(self.count + other.count, self.total + other.total, self.total_sq + other.total_sq)

    @property
    def mean(self) -> Tensor:
        """Mean; NaN when nothing was counted."""
        return self.total / self.count

    def var(self, unbiased: bool = False) -> Tensor:
        """Variance, divided by n, or by n - 1 when `unbiased`; never below 0."""
        # Rounding can leave -1e-17 for constant data, whose square root would be NaN.
        squares = (self.total_sq - self.total * self.mean).clamp(min=0)
        return squares / (self.count - int(unbiased))


def whiten(
    x: Tensor, mask: Tensor, moments: Moments | None = None, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """`x` [...] scaled to variance 1 and, with `shift_mean`, to mean 0; zero on padding, dtype of `x`.

    Ziegler et al. 2019 (arXiv:1909.08593), `whiten` of the code: advantages with `shift_mean`, rewards
    without (their mean is kept). `moments` are those of the whole global batch; without them `x` is taken
    to be all of it. Whitened in single-sequence micro-batches, the advantages of each answer would sum to
    zero.
    """
    check_shapes(x=(x, "..."), mask=(mask, "..."))
    moments = Moments.of(x, mask) if moments is None else moments
    # Subtracted in float64: a mean rounded to float32 would leave an offset of its last digit.
    whitened = (x.double() - moments.mean) * torch.rsqrt(moments.var() + eps)
    if not shift_mean:
        whitened = whitened + moments.mean
    return torch.where(mask, whitened, 0).to(x.dtype)


def last_token(mask: Tensor) -> Tensor:
    """Index int64[B] of the last token that counts in each row of `mask` bool[B, T].

    Raises ValueError naming the rows in which no token counts: they have no place for a score.
    """
    check_shapes(mask=(mask, "B T"))
    empty = ~mask.any(dim=1)
    if empty.any():
        raise ValueError(f"rows {empty.nonzero().flatten().tolist()} of mask have no token that counts")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, 0).amax(dim=1)


def sequence_weights(mask: Tensor) -> Tensor:
    """Weight float32[B, T] of each token in a mean of sequence means: 1 / length of its row, 0 on padding.

    Given to a loss together with denominator = number of sequences of the global batch.
    """
    check_shapes(mask=(mask, "B T"))
    return mask.float() / mask.sum(dim=1, keepdim=True).clamp(min=1)
