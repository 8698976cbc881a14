"""The Bradley-Terry loss of reward models, and how sure a measured accuracy is."""

from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.algorithms.shapes import at_least_float32, check_denominator, check_shapes

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal: 2.5 % are left on each side


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, denominator: float | Tensor | None = None
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), summed over B / denominator; log 2 a pair at equal scores.

    Ouyang et al. 2022 (arXiv:2203.02155) eq. 1; with the margin, Touvron et al. 2023 (Llama 2,
    arXiv:2307.09288) eq. 2. chosen, rejected, margin [B]. `denominator` is the number of pairs of the whole
    global batch, B when this call has all of it.
    """
    check_shapes(chosen=(chosen, "B"), rejected=(rejected, "B"))
    difference = at_least_float32(chosen) - at_least_float32(rejected)
    if margin is not None:
        check_shapes(chosen=(chosen, "B"), margin=(margin, "B"))
        difference = difference - margin
    if denominator is None:
        denominator = len(chosen)
    check_denominator(denominator)
    return -F.logsigmoid(difference).sum() / denominator


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs [B] in which chosen scores higher; a tie counts one half, so constant scores are at .5.

    NaN when any score is NaN or there is no pair.
    """
    check_shapes(chosen=(chosen, "B"), rejected=(rejected, "B"))
    wins = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    # A comparison with NaN is False, which would pass for an ordinary mistake.
    return torch.where(chosen.isnan() | rejected.isnan(), torch.nan, wins).mean()


class Interval(NamedTuple):
    """Bounds of a proportion."""

    low: float
    high: float


def wilson_interval(successes: float, n: int) -> Interval:
    """95 % score interval of the proportion successes / n (Wilson 1927, JASA 22:209-212).

    Unlike p +- 1.96 sqrt(p (1 - p) / n) it stays inside [0, 1] and is right near 0 and 1. `successes` may
    be a half number (ties). Raises ValueError unless n > 0 and 0 <= successes <= n.
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"need n > 0 and 0 <= successes <= n, got successes = {successes}, n = {n}")
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))
