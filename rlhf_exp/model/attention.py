"""Attention in bfloat16 on a CPU, where torch's kernel takes two to eight times as long as plain products do.

A few rows and queries at a time, in float32 from the scores to the output, which is rounded once; the kernel rounds
probabilities and slopes, too. Short texts' probabilities are kept for the backward, others are made again. Whatever
is not plain causal or masked attention goes to the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_exp.algorithms.logits import bfloat16_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "rlhf_exp"
SCORES = 2**18  # worked on at once: 1 MB in float32, which a core's caches take
QUERIES = 128  # of a block: keys after its last query are not computed
KEPT = 2**22  # probabilities of a layer that are kept for its backward: 16 MB
OTHERS = ("position_bias", "softcap", "s_aux", "cache")  # what only the kernel's caller can do


def install(model: PreTrainedModel) -> None:
    """Let a model whose attention is torch's kernel compute it here, with the same masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa" or not model._supports_attention_backend:
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query [B, H, T, h], key and value [B, G, L, h] -> [B, T, H, h], H a multiple of G.

    attention_mask bool[B, 1, T, L], True where a query sees a key; None: the last T of L causally.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (
        query.dtype != torch.bfloat16
        or query.device.type != "cpu"
        or dropout > 0
        or any(kwargs.get(name) is not None for name in OTHERS)
        or (attention_mask is None and not causal and query.shape[2] > 1)
        or (
            attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1] > 1)
        )
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] == 1 and not query.requires_grad:
        return decode(query, key, value, attention_mask, scale), None
    found = _Attention.apply(query, key, value, attention_mask, scale)
    return found.transpose(1, 2), None


def decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query a row, as `attention`: [B, 1, H, h]. Its scores are rounded: keys in float32 would be a copy each.

    K Q^T and not Q K^T, which takes 2.5 times as long where Q is one row.
    """
    b, heads, _, size = query.shape
    groups = key.shape[1]
    grouped = query.reshape(b, groups, heads // groups, size)
    scores = torch.matmul(key, grouped.transpose(2, 3)).transpose(2, 3).float().mul_(scale)
    if mask is not None:
        scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
    return torch.matmul(scores.softmax(dim=3).to(value.dtype), value).reshape(b, 1, heads, value.shape[3])


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T) V by blocks; Vaswani et al. 2017, eq. 1."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        b, heads, length, _ = query.shape
        keep = any(ctx.needs_input_grad) and b * heads * length * key.shape[2] <= KEPT
        out = query.new_empty(b, length, heads, value.shape[3]).transpose(1, 2)
        kept = []
        with torch.autocast("cpu", enabled=False), bfloat16_factors():
            for rows, blocks in _blocks(query, key, mask):
                keys, values = key[rows].float(), value[rows].float()
                for part, seen, bias in blocks:
                    probs = _probs(_grouped(query[part], key), keys[:, :, :seen], bias, scale)
                    out[part] = torch.matmul(probs, values[:, :, :seen]).view(out[part].shape)
                    kept += [probs] if keep else []
        ctx.save_for_backward(query, key, value, mask, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, mask, *kept = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        done = iter(kept)
        with torch.autocast("cpu", enabled=False), bfloat16_factors():
            for rows, blocks in _blocks(query, key, mask):
                keys, values = key[rows].float(), value[rows].float()
                d_keys = d_values = None
                for part, seen, bias in blocks:
                    q, k, g = _grouped(query[part], key), keys[:, :, :seen], _grouped(grad[part], key)
                    probs = next(done) if kept else _probs(q, k, bias, ctx.scale)
                    d_values = _sum(d_values, torch.matmul(probs.transpose(2, 3), g))
                    of_probs = torch.matmul(g, values[:, :, :seen].transpose(2, 3))
                    of_scores = torch._softmax_backward_data(of_probs, probs, 3, torch.float32)
                    of_scores.mul_(ctx.scale)
                    d_query[part] = torch.matmul(of_scores, k).view(d_query[part].shape)
                    d_keys = _sum(d_keys, torch.matmul(of_scores.transpose(2, 3), q))
                d_key[rows], d_value[rows] = d_keys, d_values
        return d_query, d_key, d_value, None, None


Part = tuple[slice, slice, slice]  # rows, heads, queries


def _blocks(
    query: Tensor, key: Tensor, mask: Tensor | None
) -> Iterator[tuple[slice, list[tuple[Part, int, Tensor]]]]:
    """A few rows at a time, and their blocks of queries: how many keys a block sees at most, and what is added to its
    scores [b or 1, 1, t, L]. The last queries come first: they see all keys."""
    b, heads, length, _ = query.shape
    # not -inf: a query that sees no key (padding on the left) would be nan, and so all that sees its value
    least = torch.finfo(torch.float32).min
    size = min(QUERIES, length)
    at_once = max(1, SCORES // (heads * size * key.shape[2]))
    ends = [min(start + size, length) for start in range(0, length, size)]
    starts, seen = (
        range(0, length, size),
        [key.shape[2] - (length - end if mask is None else 0) for end in ends],
    )
    if mask is None:
        bias = [
            torch.full((1, 1, end - start, keys), least).triu_(keys - (end - start) + 1)
            for start, end, keys in zip(starts, ends, seen, strict=True)
        ]
    for first in range(0, b, at_once):
        rows = slice(first, first + at_once)
        if mask is not None:
            added = torch.zeros(mask[rows].shape).masked_fill_(~mask[rows], least)
            bias = [added[:, :, start:end] for start, end in zip(starts, ends, strict=True)]
        parts = [(rows, slice(None), slice(start, end)) for start, end in zip(starts, ends, strict=True)]
        yield rows, list(zip(parts, seen, bias, strict=True))[::-1]


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[b, H, t, h] -> float32[b, G, H / G * t, h]: the queries of a group of heads share their keys."""
    b, heads, length, size = query.shape
    return query.float().reshape(b, key.shape[1], heads // key.shape[1] * length, size)


def _sum(total: Tensor | None, found: Tensor) -> Tensor:
    """Adds [b, G, l, h], of the first l keys, to what later queries gave to all of them."""
    if total is None:
        return found
    total[:, :, : found.shape[2]] += found
    return total


def _probs(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T + bias): grouped queries [b, G, n t, h] over keys [b, G, L, h] -> [b, G, n t, L]."""
    scores = torch.matmul(query, key.transpose(2, 3)).mul_(scale)
    b, groups, _, keys = scores.shape
    scores.view(b, groups, -1, bias.shape[2], keys).add_(bias.unsqueeze(2))
    return scores.softmax(dim=3)
