"""Norm and gated MLP of Llama's kind as one operation each: fewer passes, and less kept for the backward.

transformers' RMSNorm keeps two float32 copies of the stream for its backward, its MLP a copy of the gate's output.
Here the inputs are kept, which are there anyway.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Glm4RMSNorm", "InternLM3RMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "InternLM3MLP")


def install(model: nn.Module) -> None:
    """Into the modules whose classes are known to compute just this."""
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS:
            module.forward = MethodType(norm_forward, module)
        elif name in MLPS and isinstance(module.act_fn, nn.SiLU | type(_silu())):
            module.forward = MethodType(mlp_forward, module)


def _silu() -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN["silu"]


def norm_forward(module: nn.Module, x: Tensor) -> Tensor:
    if module.weight.requires_grad:
        return type(module).forward(module, x)
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def mlp_forward(module: nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))


class _RMSNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, in float32 (Zhang and Sennrich 2019, eq. 4)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return weight * (x * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        inner = grad * weight.float()
        mean = torch.linalg.vecdot(inner, normed).unsqueeze(-1) / x.shape[-1]
        return inner.addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, eq. 6)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up
