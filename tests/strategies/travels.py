"""Counts the bytes that go through torch.distributed, by collective: installed before DeepSpeed takes hold of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather")
sent: Counter[str] = Counter()  # of this process: bytes of what all ranks have together


def count() -> None:
    import torch.distributed

    for name in COLLECTIVES:
        setattr(torch.distributed, name, _counted(name, getattr(torch.distributed, name)))


def _counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, list | tuple) else 0

    def collective(*arguments: Any, **options: Any) -> Any:
        sent[name] += max(map(size, (*arguments, *options.values())))
        return real(*arguments, **options)

    return collective
