"""What a strategy leaves on each rank of what one process would hold.

Rows are divided before, in parts.py. Here: ddp holds weights, gradients and moments whole on every rank; zero1 and
zero2 a share of the moments; zero3 besides a share of the frozen base's layers, of which one layer is gathered for as
long as it computes, and all of them while answers are sampled; zero3_offload keeps that share in the host's memory.
Adapters, heads, embeddings and output layer stay whole (rlhf_exp/strategies). What DeepSpeed steps is a flat copy of
them (strategies/zero_adamw.py): the copy and a rank's shard of it are there always; in the step the gradients as they
are handed over, as autograd makes them of these, and in the buffer in which they are reduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.memory.counted import (
    BYTES,
    DECODE,
    GRADIENTS,
    LIBRARIES,
    OPTIMISER,
    PARAMETERS,
    PREFILL,
    STEP,
    Item,
    phases,
)

SHARDED_MOMENTS = ("zero1", "zero2", "zero3", "zero3_offload")
SHARDED_BASE = ("zero3", "zero3_offload")
# layers that are whole at once: the one that computes and the one that is fetched for after it
# (strategies/parameters.py says so to DeepSpeed)
GATHERED = 2
DEEPSPEED = 0.06e9  # what a process takes more once it has imported DeepSpeed; measured


@dataclass(frozen=True)
class Rank:
    """What one rank holds: on its device, and in the memory of the host."""

    device: list[Item]
    host: list[Item]


def on_rank(items: Iterable[Item], strategy: str, ranks: int, model: Architecture, dtype: str) -> Rank:
    """Of the items of one process those of a rank; rows are divided already."""
    items = list(items)
    every = phases(items)
    device, host = [], []
    for item in items:
        if item.kind == OPTIMISER and strategy in SHARDED_MOMENTS:
            item = replace(item, bytes=item.bytes / ranks)
        if item.role == "base" and item.kind == PARAMETERS and not item.label and strategy in SHARDED_BASE:
            for_device, for_host = _base(item, strategy, ranks, model, dtype, every)
            device += for_device
            host += for_host
            continue
        device.append(item)
    if strategy in SHARDED_MOMENTS:
        device += _deepspeed(items, ranks)
    return Rank(device, host)


def _deepspeed(items: Iterable[Item], ranks: int) -> Iterator[Item]:
    """What its optimiser holds beside ours, and the package itself where the process is on the device."""
    sizes = [item.bytes for item in items if item.kind == GRADIENTS]  # 4 bytes a trained number of each group
    if sizes:
        total = sum(sizes)
        yield Item(
            "DeepSpeed",
            PARAMETERS,
            total * (1 + 1 / ranks),
            label="a flat copy of what is trained, its shard",
        )
        yield Item(
            "DeepSpeed", GRADIENTS, total * (2 + 1 / ranks), (STEP,), label="as it is handed them, its shard"
        )
        yield Item("DeepSpeed", GRADIENTS, max(sizes), (STEP,), label="the buffer that is reduced")
    if any(item.kind == LIBRARIES for item in items):
        yield Item("process", LIBRARIES, DEEPSPEED, label="DeepSpeed")


def _base(
    item: Item, strategy: str, ranks: int, model: Architecture, dtype: str, every: list[str]
) -> tuple[list[Item], list[Item]]:
    """A sharded base: embeddings and output layer, the share, and what is gathered in each phase."""
    whole = min(item.bytes, model.by_token * BYTES[dtype])
    layers = item.bytes - whole
    share = replace(item, bytes=layers / ranks, label="share of the layers")
    device = [replace(item, bytes=whole, label="embeddings, output layer")]
    host = []
    (host if strategy == "zero3_offload" else device).append(share)
    sampled = tuple(phase for phase in every if phase in (PREFILL, DECODE))
    other = tuple(phase for phase in every if phase not in sampled)
    if sampled:
        device.append(replace(item, bytes=layers, phases=sampled, label="layers, gathered"))
    if other:
        gathered = min(layers, GATHERED * layers / model.layers)
        device.append(replace(item, bytes=gathered, phases=other, label=f"{GATHERED} layers, gathered"))
        # what is gathered comes in one piece, of which each weight is then a copy
        device.append(replace(item, bytes=layers / model.layers, phases=other, label="a layer as it comes"))
    return device, host
