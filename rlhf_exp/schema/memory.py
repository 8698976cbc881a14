"""memory=: what saves memory without changing a result, and what the memory plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf


@dataclass
class Memory:
    gradient_checkpointing: bool = leaf(
        False,
        doc="Keep each layer's input alone and compute the rest again in the backward (Chen et al. 2016): a fraction "
        "of the activations for a third more time. The result is the same.",
        keyed=False,
    )
    gb: float | None = leaf(
        None,
        doc="Memory of a device, GB (10^9 bytes), that the plan has to fit and micro_batch_size=0 fills; null: what "
        "is free. Of a machine that is not this one, such as 24, set it with dry_run=true.",
        gt=0,
        keyed=False,
    )
    ranks: int = leaf(
        0,
        doc="Processes that dry_run=true plans for; 0: as many as run (WORLD_SIZE).",
        ge=0,
        keyed=False,
    )
    device: str = leaf(
        "auto",
        doc="Kind of device that dry_run=true plans for; auto: this run's.",
        choices=("auto", "cpu", "cuda"),
        keyed=False,
    )
