"""Decoding with ILQL's Q: what beta * (Q - V) adds to the logits of a policy (Snell et al. 2022)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlhf_exp.algorithms.ilql import decoding_bonus
from rlhf_exp.model.base import Base
from rlhf_exp.model.ilql_heads import ILQLHeads
from rlhf_exp.rollout.engine import Adjust
from rlhf_exp.stages.context import HEADS_FILE, ILQL


def steer(heads: ILQLHeads, beta: float) -> Adjust | None:
    """Last hidden states [B, d] -> what decoding adds to the logits [B, V]; None at beta = 0: the plain policy.

    Q is the smaller of the lagging twins'.
    """
    if beta == 0:
        return None

    @torch.no_grad()
    def bonus(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # decoding runs inside the role's
            tables = [
                torch.nn.functional.linear(features.to(weight.dtype), weight, bias).float()
                for features, weight, bias in heads.targets(hidden)
            ]
            return decoding_bonus(torch.minimum(*tables), heads.values(hidden), beta)

    return bonus


def heads_file(run: Path) -> Path:
    """Where a run of ilql has its Q and V."""
    return run / ILQL / HEADS_FILE


def of_run(run: Path, beta: float, base: Base) -> Adjust | None:
    """`steer` with the heads of a run's folder."""
    if beta == 0:
        return None
    return steer(ILQLHeads.load(heads_file(run), base.hidden_size, base.output_layer[0]), beta)
