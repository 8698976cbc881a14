"""ALiBi (Press, Smith & Lewis 2022): attention minus a slope times the distance, instead of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slopes(heads: int) -> list[float]:
    """The slope of each head (section 3): 2^(-8/n), 2^(-16/n), ... for n a power of two.

    Otherwise (13B has 40 heads) those of the power of two below, followed by every second slope of the power above,
    as in the authors' code, which Baichuan follows.
    """
    below = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    between = [2.0 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * below, 2)]
    return (first + between)[:heads]


def bias(
    heads: int, queries: int, keys: int, past: int | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(float32[1, heads, queries, keys] to add to the scores, bool[queries, keys] of what comes before).

    The queries stand at places `past`, `past` + 1, ... of the keys. Only differences of places enter: padding on
    the left moves a row without changing it. (Baichuan-13B's own code adds slope * place of the key, which
    differs by a constant in each row of the softmax and so is the same, but loses digits in bfloat16.)
    """
    place = torch.arange(queries, device=device) + past
    distance = torch.arange(keys, device=device)[None, :] - place[:, None]
    slope = torch.tensor(slopes(heads), device=device)
    return (slope[:, None, None] * distance)[None], distance <= 0


def by_key(heads: int, keys: int, device: torch.device) -> Tensor:
    """float32[1, heads, 1, keys], slope * place of the key: the same to a softmax, without a row a query."""
    slope = torch.tensor(slopes(heads), device=device)
    return (slope[:, None] * torch.arange(keys, device=device))[None, :, None]


def merged(heads: int, mask: Tensor | None, queries: int, past: int | Tensor, like: Tensor) -> Tensor:
    """The additive mask [B or 1, heads, queries, keys] in the dtype of `like`.

    mask: what transformers' masking gives: None (causal without padding), bool (True may be seen), or float (0 may
    be seen), [B, 1, queries, keys].
    """
    keys = mask.shape[-1] if mask is not None else int(past) + queries
    added, seen = bias(heads, queries, keys, past, like.device)
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask == 0
    # the lowest number, not -inf: a query of the padding sees nothing, and its softmax would be NaN
    return torch.where(seen, added.to(like.dtype), torch.finfo(like.dtype).min)
