"""A frozen linear layer whose float32 products go where they are fastest (algorithms/product.py)."""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_exp.algorithms.product import linear, onednn


def install(model: nn.Module) -> None:
    """Into every plain linear layer, where that changes anything: LoRA's layers compute so themselves, and a layer
    has to give the same numbers with an adapter of zeros and without one."""
    if not onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.is_cuda:
            module.forward = MethodType(forward, module)


def forward(module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if weight.requires_grad or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias)
    return linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None (both frozen) -> [..., out]."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.T), None, None
