"""From logits to a token: which tokens may be drawn, and the draw.

Order as in Hugging Face's generate: forbidden tokens, temperature, top-k, top-p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_exp.schema import Generation


def restricts(generation: Generation) -> bool:
    """Whether the kept set must be recorded: top-k or top-p is on."""
    return generation.top_k > 0 or generation.top_p < 1


def scaled_logits(logits: Tensor, generation: Generation, position: int, eos_id: int) -> Tensor:
    """Logits [B, V] over the temperature in float32, EOS at -inf while `position` < min_new_tokens."""
    logits = logits.float() / generation.temperature
    if position < generation.min_new_tokens:
        logits[:, eos_id] = -torch.inf
    return logits


def kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """bool[B, V] of the tokens that top-k and then top-p keep, at least one a row.

    top-k (Fan et al. 2018): the k largest; of equal logits the lower ids. top-p (Holtzman et al. 2020, eq. 2): the
    smallest set of most probable tokens with mass >= p, under the distribution that top-k left.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ordered = logits.gather(-1, order)
    keep = ordered > -torch.inf
    if top_k > 0:
        keep[:, top_k:] = False
    if top_p < 1:
        probs = ordered.masked_fill(~keep, -torch.inf).softmax(dim=-1)
        # the mass before a token: it is kept while that is still short of p
        keep &= probs.cumsum(dim=-1) - probs < top_p
        keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Token ids int64[B] by inverting the distribution function of softmax(logits [B, V]) at `u` float64[B].

    A token with logit -inf is never drawn. Raises FloatingPointError naming the first row whose logits are no
    distribution (NaN, +inf, or nothing kept).
    """
    cumulative = logits.softmax(dim=-1).to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        row = int((~torch.isfinite(total)).nonzero()[0, 0])
        raise FloatingPointError(f"row {row}: the logits hold nan or inf, or every token is forbidden")
    # the first token whose cumulative mass exceeds u: `right` steps over tokens of mass 0
    return torch.searchsorted(cumulative, u[:, None] * total, right=True).squeeze(1)
