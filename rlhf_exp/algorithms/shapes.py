"""Checks that turn a wrong shape or dtype into one readable sentence instead of a silent broadcast."""

import torch
from torch import Tensor


def check_shapes(**named: tuple[Tensor, str]) -> None:
    """Raise ValueError unless every tensor has its named dimensions and equal names have equal sizes.

    Usage: `check_shapes(scores=(scores, "B"), kl=(kl, "B T"))`. A leading "..." stands for any number of
    dimensions, the same ones in every tensor of the call. Arguments called `mask` or `allowed` must be bool:
    with a 0/1 float mask, `~mask` and indexing mean something else.
    """
    bound: dict[str, tuple[object, str]] = {}
    for name, (tensor, spec) in named.items():
        dims = spec.split()
        shape = list(tensor.shape)
        sizes: list[tuple[str, object]] = []
        if dims[:1] == ["..."]:
            dims = dims[1:]
            lead = len(shape) - len(dims)
            sizes.append(("...", tuple(shape[: max(lead, 0)])))
            shape = shape[lead:] if lead >= 0 else []
        if len(shape) != len(dims):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{', '.join(spec.split())}]")
        for dim, size in sizes + list(zip(dims, shape, strict=True)):
            expected, owner = bound.setdefault(dim, (size, name))
            if size != expected:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, expected [{', '.join(spec.split())}]"
                    f" with {dim} = {expected} as in {owner}"
                )
        if name in ("mask", "allowed") and tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be bool (True where a token counts), got {tensor.dtype}")


def check_denominator(denominator: float | Tensor) -> None:
    """Raise ValueError for a number that is not positive; a tensor is not read: no wait for the device."""
    if not isinstance(denominator, Tensor) and not denominator > 0:
        raise ValueError(
            f"denominator (tokens or sequences of the whole batch) must be positive, got {denominator}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 as float32, others unchanged: a sum or a softmax in 8 bits of mantissa loses tokens."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
