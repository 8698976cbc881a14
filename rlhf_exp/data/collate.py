"""Rows of token ids -> padded tensors: the only place that pads.

Lengths and masks come from the rows' lengths and never from the token ids: in many models PAD is EOS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids int64[B, T] with each row at the left edge, lengths int64[B]; T is the longest row's length."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(map(len, rows), default=0)
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.int64)
    return ids.reshape(len(rows), width), lengths


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids int64[B, T] with each row at the right edge, mask bool[B, T], True where a token of the row is."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(map(len, rows), default=0)
    ids = torch.tensor([[*[pad_id] * (width - len(row)), *row] for row in rows], dtype=torch.int64)
    mask = torch.arange(width)[None, :] >= (width - lengths)[:, None]
    return ids.reshape(len(rows), width), mask


def grouped(rows: Sequence[int], lengths: Sequence[int], size: int, tokens: int = 0) -> list[list[int]]:
    """`rows` in groups that follow each other, of at most `size` rows and, padded, at most `tokens` tokens.

    lengths: of the rows, which should rise. tokens = 0: no limit; a row longer than the limit is a group by itself.
    """
    found: list[list[int]] = []
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        longest = max(longest, length) if found else length
        if not found or len(found[-1]) == size or (tokens and (len(found[-1]) + 1) * longest > tokens):
            found.append([])
            longest = length
        found[-1].append(row)
    return found
