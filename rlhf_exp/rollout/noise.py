"""Counter-based random numbers: the noise of a token depends on its row and position, on nothing else.

A row is (seed, step, prompt id, sample index). Which other rows are in the batch, in what order, on how many
ranks, and whether the run was resumed therefore change no sampled token (up to rounding of the logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def splitmix(x: int) -> int:
    """One output of SplitMix64 (Steele, Lea & Flood 2014, figure 9): a bijection of 64-bit integers."""
    x = (x + _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * _MIX[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MIX[1]) & _MASK
    return x ^ (x >> 31)


def row_key(seed: int, step: int, prompt_id: int, sample: int = 0) -> int:
    """The 64-bit key of a row, as a signed integer (torch has no unsigned arithmetic)."""
    key = 0
    for part in (seed, step, prompt_id, sample):
        key = splitmix(key ^ (part & _MASK))
    return _signed(key)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Tensor, position: int | Tensor) -> Tensor:
    """Uniform numbers float64[B] in [0, 1) for rows `keys` int64[B] at token `position` (int or int64[B])."""
    # SplitMix64's stream of the key, at this position; int64 products wrap as unsigned ones do
    x = keys + (torch.as_tensor(position, device=keys.device) + 1) * _signed(_GAMMA)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX[1])
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53
