"""Optimiser and learning rate, the same for every stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rlhf_exp.schema import Optim, Strategy

# our names -> those of transformers.get_scheduler
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def adamw(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], optim: Optim, strategy: Strategy | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with the config's settings; groups may have an `lr` of their own.

    With strategy=zero* its moments are sharded over the ranks. With optim.moments=8bit they are quantised by blocks
    (Dettmers et al. 2022): bitsandbytes' AdamW8bit.
    """
    more = {}
    if strategy is not None and strategy.name.startswith("zero"):
        from rlhf_exp.strategies.zero_adamw import ZeroAdamW as Kind

        more = {"strategy": strategy}
    elif optim.moments == "8bit":
        from bitsandbytes.optim import AdamW8bit as Kind
    else:
        from torch.optim import AdamW as Kind
    return Kind(
        parameters,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        **more,
    )


def schedule(
    optimizer: torch.optim.Optimizer, optim: Optim, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up over `warmup_ratio` of the steps, then linear or cosine to 0, or constant."""
    from transformers import get_scheduler

    warmup = round(optim.warmup_ratio * steps)
    return get_scheduler(
        SCHEDULES[optim.schedule], optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
