"""The losses of reward models, all built on Bradley-Terry's, and how sure a measured accuracy is.

Every loss is a sum over the pairs of a call / denominator, so that micro-batches add up to the large batch.
"""

from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.algorithms.masked import masked_mean
from rlhf_exp.algorithms.shapes import at_least_float32, check_denominator, check_shapes

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal: 2.5 % are left on each side


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), summed over B / denominator; log 2 a pair at equal scores.

    Ouyang et al. 2022 (arXiv:2203.02155) eq. 1; with the margin, Touvron et al. 2023 (Llama 2,
    arXiv:2307.09288) eq. 2; with `label_smoothing` e in [0, 0.5), the share of labels taken to be swapped,
    (1 - e) times that plus e times the loss of the swapped pair (Mitchell 2023, "A note on DPO with noisy preferences
    and its relationship to IPO", eq. 3). chosen, rejected, margin [B]. `denominator` is the number of pairs of
    the whole global batch, B when this call has all of it.
    """
    check_shapes(chosen=(chosen, "B"), rejected=(rejected, "B"))
    difference = at_least_float32(chosen) - at_least_float32(rejected)
    if margin is not None:
        check_shapes(chosen=(chosen, "B"), margin=(margin, "B"))
        difference = difference - margin
    if denominator is None:
        denominator = len(chosen)
    check_denominator(denominator)
    return _smoothed(difference, label_smoothing).sum() / denominator


def token_wise_loss(
    chosen: Tensor,
    rejected: Tensor,
    mask: Tensor,
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
) -> Tensor:
    """The pairwise loss at every token where `mask` is True, a mean within each pair, summed over B / denominator.

    The reward loss of trlX's TL;DR example and of DeepSpeed-Chat (Yao et al. 2023, arXiv:2308.01320), which compares
    all scores from the first token where the answers differ: `compared_tokens` gives that mask.
    chosen, rejected [B, T] scores after each token, mask bool[B, T]; padding never matters. margin [B], a pair's at
    each of its tokens. Raises ValueError for a pair in which no token counts.
    """
    check_shapes(chosen=(chosen, "B T"), rejected=(rejected, "B T"), mask=(mask, "B T"))
    if not mask.any(dim=1).all():
        rows = (~mask.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of mask have no token that counts")
    if denominator is None:
        denominator = len(chosen)
    check_denominator(denominator)
    difference = torch.where(mask, at_least_float32(chosen) - at_least_float32(rejected), 0)
    if margin is not None:
        check_shapes(chosen=(chosen, "B T"), margin=(margin, "B"))
        difference = difference - margin.unsqueeze(1)
    return masked_mean(_smoothed(difference, label_smoothing), mask, dim=1).sum() / denominator


def compared_tokens(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """Mask bool[B, T]: from the first token where the sequences differ to the end of the longer one.

    Token ids int64[B, T] right-padded, lengths int64[B]; the end of one differs from any token of the other.
    Two equal sequences are compared at their last token.
    """
    check_shapes(
        chosen=(chosen, "B T"),
        rejected=(rejected, "B T"),
        chosen_lengths=(chosen_lengths, "B"),
        rejected_lengths=(rejected_lengths, "B"),
    )
    places = torch.arange(chosen.shape[1], device=chosen.device)
    shorter, longer = (
        pick(chosen_lengths, rejected_lengths).unsqueeze(1) for pick in (torch.minimum, torch.maximum)
    )
    differs = ((chosen != rejected) | (places >= shorter)) & (places < longer)
    begun = differs.cumsum(dim=1) > 0
    return (begun & (places < longer)) | (~differs.any(dim=1, keepdim=True) & (places == longer - 1))


def held(scores: Tensor, lengths: Tensor) -> Tensor:
    """Scores [B, T] in which every place after a sequence's end has the score of its last token.

    The shorter answer of a pair has ended where the longer one goes on: what it is worth stays what it was at its
    end. (trlX and DeepSpeed-Chat read the head at padding tokens there, so that the padding's content matters.)
    """
    check_shapes(scores=(scores, "B T"), lengths=(lengths, "B"))
    places = torch.arange(scores.shape[1], device=scores.device)
    return scores.gather(1, torch.minimum(places.unsqueeze(0), lengths.unsqueeze(1) - 1))


def centering_loss(chosen: Tensor, rejected: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """(chosen + rejected)^2 summed over B / denominator: pulls the mean score of a pair to 0.

    Eisenstein et al. 2023 (arXiv:2312.09244, "Helping or herding?"), the regulariser of its reward models, there with
    the coefficient 0.01. chosen, rejected [B].
    """
    check_shapes(chosen=(chosen, "B"), rejected=(rejected, "B"))
    if denominator is None:
        denominator = len(chosen)
    check_denominator(denominator)
    return (at_least_float32(chosen) + at_least_float32(rejected)).square().sum() / denominator


def _smoothed(difference: Tensor, label_smoothing: float) -> Tensor:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    loss = -F.logsigmoid(difference)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-difference)


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
