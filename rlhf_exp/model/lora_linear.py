"""A LoRA layer as one operation: y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, eq. 3).

PEFT's layer writes and reads the wide [N, out] four times more: for the product with B, its scaling, the sum, and the
casts of A and B. Here the product with B adds onto the base's, scaled. The backward likewise.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_exp.algorithms.product import linear


def install(layer: nn.Module) -> None:
    """Let a PEFT LoRA layer on a plain linear layer compute in one operation where it can."""
    from peft.tuners.lora import Linear

    base = layer.get_base_layer()
    # DeepSpeed's shard of a weight (zero3) becomes a weight in the linear layer's own forward only
    if type(layer) is Linear and type(base) is nn.Linear and not hasattr(base.weight, "ds_id"):
        layer.forward = MethodType(forward, layer)


def casts(layer: nn.Module) -> bool:
    """Whether the layer's adapters are used in the base's dtype here, without autocast."""
    plain = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    return "forward" in vars(layer) and plain and not layer.lora_variant


def forward(layer: nn.Module, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """As PEFT's; whatever is not one plain adapter without dropout is left to it."""
    role = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    base = layer.get_base_layer()
    if (
        arguments
        or options
        or layer.disable_adapters
        or layer.merged
        or role not in layer.lora_A
        or role in layer.lora_variant  # DoRA
        or base.weight.requires_grad
        or layer.lora_A[role].bias is not None
        or layer.lora_B[role].bias is not None
        or (layer.training and not isinstance(layer.lora_dropout[role], nn.Identity))
    ):
        return type(layer).forward(layer, x, *arguments, **options)
    a, b, scale = layer.lora_A[role].weight, layer.lora_B[role].weight, layer.scaling[role]
    x = x.to(base.weight.dtype)
    if not torch.is_grad_enabled():  # each decoded token: what autograd costs would be a tenth of it
        return _compute(x, base.weight, base.bias, a, b, scale)[0].view(*x.shape[:-1], -1)
    return _LoraLinear.apply(x, base.weight, base.bias, a, b, scale)


def _compute(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, out] of x [..., in] as N rows, these rows, and x A^T [N, r]."""
    with _no_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.to(x.dtype).T
        out = linear(rows, weight, bias).addmm_(inner, b.to(x.dtype).T, alpha=scale)
    return out, rows, inner


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _LoraLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None (both frozen), a [r, in], b [out, r] -> [..., out]."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        out, rows, inner = _compute(x, weight, bias, a, b, scale)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], out.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, a, b, inner = ctx.saved_tensors
        d_x = d_a = d_b = None
        with _no_autocast(grad):
            grad = grad.reshape(-1, grad.shape[-1])
            d_inner = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
            if ctx.needs_input_grad[0]:
                d_x = linear(grad, weight.T).addmm_(d_inner, a.to(grad.dtype)).view(ctx.shape)
            if ctx.needs_input_grad[3]:
                d_a = (d_inner.T @ rows).to(a.dtype)
            if ctx.needs_input_grad[4]:
                d_b = (grad.T @ inner).to(b.dtype).mul_(ctx.scale)
        return d_x, None, None, d_a, d_b, None
