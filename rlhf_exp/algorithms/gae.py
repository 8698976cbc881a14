"""Generalised advantage estimation."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.algorithms.shapes import at_least_float32, check_shapes


class GAE(NamedTuple):
    """Both [B, T], zero on padding, without gradient; not whitened."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> GAE:
    """Advantages and the critic's targets of right-padded episodes.

    Schulman et al. 2016 (arXiv:1506.02438) eq. 16, as a recursion from the last token:
        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        R_t     = A_t + V_t   (the lambda-return)
    V and A are 0 after the last real token: the answer ends there, also where it was cut at the length limit.
    rewards, values [B, T], mask bool[B, T]; gamma and lam in [0, 1]. Raises ValueError for rows that are not
    right-padded, because a gap would cut an episode in two.
    """
    check_shapes(rewards=(rewards, "B T"), values=(values, "B T"), mask=(mask, "B T"))
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    gaps = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if gaps.any():
        raise ValueError(f"rows {gaps.nonzero().flatten().tolist()} of mask are not right-padded")
    # With zeros in padding, all that follows the last real token is the 0 that the recursion needs.
    rewards = torch.where(mask, at_least_float32(rewards), 0)
    values = torch.where(mask, at_least_float32(values), 0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return GAE(advantages, advantages + values)
