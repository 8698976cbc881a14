"""Steps of transformers' Trainer on several ranks: each Trainer sees the whole batch and computes this rank's rows.

So a Trainer knows of no ranks at all: its order of data, its counting of tokens, clipping and logs are those of one
process. Losses here are shares of a mean over the whole step, which add up, and so do gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import distributed

TOKENS = "num_tokens"  # TRL's metric that is a sum


def finish(trainer: Any, total: Tensor) -> Tensor:
    """After this rank's backwards: the gradients and the loss of all ranks."""
    if distributed.world_size() == 1:
        return total
    distributed.sum_gradients([p for group in trainer.optimizer.param_groups for p in group["params"]])
    return torch.tensor(distributed.add({"loss": float(total)})["loss"], device=total.device)


def join_metrics(trainer: Any, shares: Sequence[float], tokens_before: int) -> None:
    """TRL's figures of a step from those of its parts, each in its share of the step; then of all ranks.

    tokens_before: TRL's counter of tokens as it was before the step, where it has one.
    """
    metrics: dict[str, list[float]] = trainer._metrics["train"]
    if distributed.world_size() == 1:
        for name, values in metrics.items():  # of this step alone: each step is logged
            if len(values) == len(shares):
                mean = sum(share * value for share, value in zip(shares, values, strict=True))
                metrics[name] = [mean]
        return
    found = {
        name: sum(share * value for share, value in zip(shares, values, strict=True))
        for name, values in metrics.items()
        if name != TOKENS and len(values) == len(shares)
    }
    found["tokens"] = float(getattr(trainer, "_total_train_tokens", 0) - tokens_before)
    found = distributed.add(found)
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens_before + int(found["tokens"])
        metrics[TOKENS] = [trainer._total_train_tokens]
    del found["tokens"]
    metrics.update({name: [value] for name, value in found.items()})
