"""Margins of comparisons: how far apart the reward model's loss wants their scores (Touvron et al. 2023, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Comparison
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Reward, RewardRun

if TYPE_CHECKING:
    from torch import Tensor


def require(config: RewardRun) -> None:
    """InputError where margins are asked for and no comparison has one; before anything is loaded."""
    coef = config.reward.margin_coef
    if coef and all(row.margin is None for row in load_view(config.dataset, "comparisons", "train")):
        raise InputError(
            f"reward.margin_coef={coef:g} needs comparisons with margins, and those of dataset {config.dataset.name} "
            "have none: set dataset.fields.margin (family jsonl), or leave it out"
        )


def margins_of(reward: Reward, rows: Sequence[Comparison]) -> Tensor | None:
    """float32[pairs], reward.margin_coef times the data's, 0 for a row that has none; None where it is 0."""
    if not reward.margin_coef:
        return None
    import torch

    return reward.margin_coef * torch.tensor([row.margin or 0.0 for row in rows])
