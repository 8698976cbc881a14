"""Causal attention of several texts in one row, in blocks of queries: what comes before, and nothing that is masked.

torch's kernel takes no window or bias without a mask of all scores, and on a CPU it takes longer than the plain
products below, in bfloat16 three times as long. Blocks of queries leave out most of what a causal mask would throw
away. The backward is by hand: autograd would keep the scores beside their softmax, and fill a row with zeros for each
slice. (attention.py is the like for rows of one text; it keeps nothing and makes its scores again.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_exp.algorithms.logits import bfloat16_factors

ROWS = 128  # queries of a block


class Text(NamedTuple):
    """Places of the row that follow each other in one text: `near` sees itself and all of `before`."""

    before: slice  # may be empty
    near: slice


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: Sequence[Text],
    scaling: float,
    bias: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scaling * q k + bias) v: query [1, H, T, d], key, value [1, G, T, d] -> [1, H, T, d].

    The `near` of the texts are disjoint and cover the row in order. H is a multiple of G (Ainslie et al. 2023,
    grouped queries). bias [1, H, 1, T], without gradient, by the key's place in its text (added is the same for the
    first key of every text). window: a token sees itself and window - 1 before it in its text.
    """
    if query.is_cuda:
        return _fused(query, key, value, texts, scaling, bias, window)
    return _Attend.apply(query, key, value, texts, scaling, bias, window)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: Sequence[Text],
    scaling: float,
    bias: Tensor | None,
    window: int | None,
) -> Tensor:
    """By torch's kernels, a call a text, which are the faster ones on CUDA."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    cuts = sorted({0, query.shape[2], *(edge for text in texts for edge in _edges(text))})
    # one split, whose backward is one concatenation: a slice's backward is a whole row of zeros
    sizes = [b - a for a, b in pairwise(cuts)]
    pieces = [dict(zip(cuts, x.split(sizes, dim=2), strict=False)) for x in (query, key, value)]

    def of(which: int, part: slice) -> list[Tensor]:
        return [pieces[which][cut] for cut in cuts[:-1] if part.start <= cut < part.stop]

    found = []
    for text in texts:
        q = torch.cat(of(0, text.near), dim=2)
        k, v = (torch.cat([*of(i, text.before), *of(i, text.near)], dim=2) for i in (1, 2))
        n, m = q.shape[2], k.shape[2]
        if n == m and bias is None and window is None:
            found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
            continue
        mask = ~_hidden(n, m, window, q.device)
        if bias is not None:
            mask = torch.where(mask, bias[..., :m].to(q.dtype), -torch.inf)
        found.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(found, dim=2)


def _edges(text: Text) -> tuple[int, ...]:
    return text.before.start, text.before.stop, text.near.start, text.near.stop


def _hidden(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool[rows, keys], True where the last `rows` of `keys` places may not look."""
    distance = torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


class _Block(NamedTuple):
    """Some queries of a text and the keys that any of them sees, as places in the row, and the first key's place."""

    rows: slice
    keys: list[slice]
    first: int


def _blocks(texts: Sequence[Text], window: int | None) -> Iterator[_Block]:
    for before, near in texts:
        ahead = before.stop - before.start
        for start in range(near.start, near.stop, ROWS):
            stop = min(start + ROWS, near.stop)
            first = 0 if window is None else max(0, ahead + start - near.start - window + 1)
            own = slice(near.start + max(0, first - ahead), stop)
            keys = [slice(before.start + first, before.stop), own] if first < ahead else [own]
            yield _Block(slice(start, stop), keys, first)


def _joined(x: Tensor, parts: list[slice]) -> Tensor:
    return x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, part] for part in parts], dim=2)


class _Attend(torch.autograd.Function):
    """All blocks of a row; kept for the backward are the row's queries, keys and values and the softmax weights."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        texts: Sequence[Text],
        scaling: float,
        bias: Tensor | None,
        window: int | None,
    ) -> Tensor:
        dtype, size = value.dtype, query.shape[3]
        shape = (1, key.shape[1], -1, size)  # of queries: those that share a key stand together
        triangle = _hidden(ROWS, ROWS, None, query.device)
        found, kept = [], []
        with _plainly(dtype):
            for rows, keys, first in _blocks(texts, window):
                number = rows.stop - rows.start
                # scores that nothing has rounded, as in torch's kernel
                own, seen = query[:, :, rows].reshape(shape).float(), _joined(key, keys).float()
                scores = (own @ seen.transpose(2, 3)).mul_(scaling)
                scores = scores.view(1, -1, number, scores.shape[3])
                if bias is not None:
                    scores += bias[..., first : first + scores.shape[3]]
                if window is None:
                    scores[..., -number:].masked_fill_(triangle[:number, :number], -torch.inf)
                else:
                    hidden = _hidden(number, scores.shape[3], window, scores.device)
                    scores.masked_fill_(hidden, -torch.inf)
                weights = scores.softmax(dim=-1).to(dtype).view(1, key.shape[1], -1, scores.shape[3])
                kept.append(weights)
                found.append((weights @ _joined(value, keys)).view(1, -1, number, size))
        ctx.texts, ctx.scaling, ctx.window = texts, scaling, window
        ctx.save_for_backward(query.to(dtype), key.to(dtype), value, *kept)
        return torch.cat(found, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        shape = (1, key.shape[1], -1, query.shape[3])
        gradient = gradient.to(value.dtype)
        for (rows, keys, _), weights in zip(_blocks(ctx.texts, ctx.window), kept, strict=True):
            own = gradient[:, :, rows].reshape(shape)
            _add(of_value, keys, weights.transpose(2, 3) @ own)
            # of the softmax: w * (g - sum(w * g))
            inner = own @ _joined(value, keys).transpose(2, 3)
            inner = torch._softmax_backward_data(inner, weights, 3, weights.dtype).mul_(ctx.scaling)
            of_query[:, :, rows] = (inner @ _joined(key, keys)).view(1, query.shape[1], -1, query.shape[3])
            _add(of_key, keys, inner.transpose(2, 3) @ query[:, :, rows].reshape(shape))
        return of_query, of_key, of_value, None, None, None, None


@contextmanager
def _plainly(dtype: torch.dtype) -> Iterator[None]:
    """No autocast, whatever is around; float32 products of bfloat16 numbers as fast as the CPU has them."""
    with (
        torch.autocast("cpu", enabled=False),
        bfloat16_factors() if dtype == torch.bfloat16 else nullcontext(),
    ):
        yield


def _add(whole: Tensor, parts: list[slice], more: Tensor) -> None:
    sizes = [part.stop - part.start for part in parts]
    for part, piece in zip(parts, more.split(sizes, dim=2), strict=True):
        whole[:, :, part] += piece
