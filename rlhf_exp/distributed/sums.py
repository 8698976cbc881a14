"""What the ranks have of their rows, put together: numbers, results by row, tensors, gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rlhf_exp.distributed.exchange import gather
from rlhf_exp.distributed.identity import world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


def add(figures: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks by name; the same float on every rank."""
    if world_size() == 1:
        return dict(figures)
    total: dict[str, float] = {}
    for found in gather(dict(figures)):
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
    return total


def union(found: dict[int, T]) -> dict[int, T]:
    """What all ranks have found, by row; each row was one rank's."""
    if world_size() == 1:
        return found
    return {row: value for each in gather(found) for row, value in each.items()}


def highest(value: float) -> float:
    """The largest over the ranks; nan where one has it."""
    if world_size() == 1:
        return value
    values = gather(value)
    return next((x for x in values if x != x), max(values))


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Each becomes its sum over the ranks, in place; those of one dtype travel as one."""
    if world_size() == 1 or not tensors:
        return
    import torch
    from torch import distributed

    for dtype in dict.fromkeys(x.dtype for x in tensors):
        some = [x for x in tensors if x.dtype == dtype]
        flat = torch.cat([x.reshape(-1) for x in some])
        distributed.all_reduce(flat)
        for x, summed in zip(some, flat.split([x.numel() for x in some]), strict=True):
            x.copy_(summed.view_as(x))


def sum_gradients(parameters: Iterator[torch.nn.Parameter] | Sequence[torch.nn.Parameter]) -> None:
    """Gradients become their sums over the ranks; a parameter that has none on any rank still has none."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    parameters = list(parameters)
    if not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    distributed.all_reduce(has, op=distributed.ReduceOp.MAX)
    some = [p for p, found in zip(parameters, has.tolist(), strict=True) if found]
    for parameter in some:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_tensors([p.grad for p in some])
