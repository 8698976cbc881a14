"""zero3: the frozen base's weights in shards, one a rank, gathered layer by layer (Rajbhandari et al. 2020).

DeepSpeed cuts the weights up and puts hooks on the trunk's modules: a module's weights are whole during its forward,
and again during its backward. Adapters come onto the modules afterwards and are whole on every rank, as is what
belongs to their optimiser (zero_adamw.py): they are megabytes. Embeddings and output layer stay whole too, because
log-probs read the output layer in pieces, outside of any module's forward.

All ranks must go through the same forwards and backwards: distributed.turns sees to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rlhf_exp.model.base import Base
from rlhf_exp.schema import Strategy
from rlhf_exp.strategies.zero_adamw import FOR_THE_OPTIMISER, OURS, THEIRS, quietly


def shard(base: Base, strategy: Strategy) -> None:
    """Cut the trunk's weights up, in place. Nothing may be on the base yet."""
    given = {key: value for key, value in strategy.deepspeed.items() if key not in THEIRS}
    zero = given.get("zero_optimization", {})
    zero = {
        key: value for key, value in zero.items() if key not in FOR_THE_OPTIMISER or key == "overlap_comm"
    }
    # DeepSpeed knows each setting under a short name too
    known = live(base.trunk).items()
    zero = {key: value for key, value in known if key.removeprefix("stage3_") not in zero} | zero
    half = {"bf16": {"enabled": True}} if base.dtype == torch.bfloat16 else {}
    settings = given | OURS | half | {"zero_optimization": zero | {"stage": 3}}
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        print("zero3: DeepSpeed's async_io is compiled the first time, which takes minutes", flush=True)
    with quietly() as deepspeed:
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

        # a check of each new order of modules, and a collective; it reads LOCAL_RANK, which distributed/ has taken
        coordinator.assert_ints_same_as_other_ranks = lambda order: None
        with _without(base.trunk, _read_outside(base.model)):
            engine = deepspeed.initialize(model=base.trunk, config=settings)[0]
    found = Sharded(base.trunk, engine.optimizer)
    found.parts += [p for p in base.trunk.parameters() if hasattr(p, "ds_id")]
    base.trunk.register_forward_pre_hook(found.begin)
    base.shards = found
    sizes = sum(p.ds_numel for p in found.parts)
    print(
        f"zero3: {sizes / 1e6:.1f} of {_count(base.model) / 1e6:.1f} M weights of the base are in shards",
        flush=True,
    )


# settings of stage 3 about what is gathered at a time, in numbers: DeepSpeed's own ones, 10^9 and 5 10^7, are more
# than all of a small base
LIVE, REUSE, PREFETCH = (
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
)


def live(trunk: nn.Module) -> dict[str, int]:
    """The layer that computes and the one after it are whole at once (memory/strategies.py counts them), no more."""
    layer = largest_layer(trunk)
    return {LIVE: 2 * layer, REUSE: layer, PREFETCH: layer}


def largest_layer(trunk: nn.Module) -> int:
    """Numbers of the largest module in a list of modules; of the trunk, where it has no list."""
    lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for found in lists for layer in found] or [trunk]
    return max(sum(p.numel() for p in layer.parameters()) for layer in layers)


def _read_outside(model: nn.Module) -> list[nn.Parameter]:
    """The embeddings' and the output layer's weights, which may be the same."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [p for layer in layers if layer is not None for p in layer.parameters()]


@contextmanager
def _without(trunk: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The trunk without the modules that hold these: DeepSpeed neither cuts them up nor hooks them.

    (Its mark for weights that stay whole, ds_persist, is not heeded before it has seen a step from end to end.)
    """
    held = {id(p) for p in parameters}
    places = [
        (parent, name, child)
        for parent in trunk.modules()
        for name, child in parent.named_children()
        if any(id(p) in held for p in child.parameters(recurse=False))
    ]
    for parent, name, _ in places:
        setattr(parent, name, nn.Identity())
    try:
        yield
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def _count(model: nn.Module) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


@dataclass
class Sharded:
    """DeepSpeed's hooks on the trunk, and the weights that they gather and give back."""

    trunk: nn.Module
    offload: Any  # DeepSpeed's DeepSpeedZeRoOffload
    parts: list[nn.Parameter] = field(default_factory=list)

    def begin(self, *_: Any) -> None:
        """Before a forward: give back what a backward has left whole (layers whose input has no gradient)."""
        self.offload.release_backward_leftovers()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are gathered once, and the hooks rest: ranks may go through different numbers of forwards."""
        import deepspeed

        working = self.offload.param_coordinator
        working.release_backward_leftovers()
        for p in self.parts:  # a backward that another role's forward came before leaves marks, too
            p.ds_active_sub_modules.clear()
        with deepspeed.zero.GatheredParameters(self.parts):
            self.offload.param_coordinator = Resting()
            try:
                yield
            finally:
                self.offload.param_coordinator = working


class Resting:
    """Takes the place of DeepSpeed's coordinator, and does nothing."""

    def is_record_trace(self) -> bool:
        return False

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    reset_step = trace_prologue = record_module = _nothing
    fetch_sub_module = release_sub_module = release_backward_leftovers = _nothing
