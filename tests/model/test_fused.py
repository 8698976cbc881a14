"""Norm, gated MLP and LoRA layer as one operation: values and gradients of transformers' and PEFT's own forwards."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf_exp.model import fused, lora_linear

# of the largest number: sums in another order; in bfloat16 one or two roundings
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(CLOSE))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(module, forward, x, dtype):
    """Outputs and gradients of `forward(module, x)` and of the module's class, for an output's random gradient."""
    results = []
    for function in (forward, type(module).forward):
        for parameter in module.parameters():
            parameter.grad = None
        given = x.clone().requires_grad_()
        out = function(module, given)
        out.backward(drawn(*out.shape, seed=9, dtype=out.dtype))
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        results.append([out.detach(), given.grad, *grads])
    assert len(results[0]) == len(results[1])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= CLOSE[dtype] * wanted.abs().max()


@DTYPES
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norm(kind, dtype):
    norm = kind(24, eps=1e-3)
    norm.weight.data = drawn(24, seed=1)
    compare(norm.to(dtype).requires_grad_(False), fused.norm_forward, drawn(3, 5, 24, dtype=dtype), dtype)


def test_norm_of_zeros_has_gradients():
    norm = LlamaRMSNorm(8).requires_grad_(False)
    x = torch.zeros(2, 8, requires_grad=True)
    fused.norm_forward(norm, x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_trained_norm_is_left_to_its_class():
    norm = LlamaRMSNorm(8)
    fused.norm_forward(norm, drawn(2, 8)).sum().backward()
    assert norm.weight.grad is not None


@DTYPES
def test_mlp(dtype):
    config = LlamaConfig(hidden_size=16, num_attention_heads=4, intermediate_size=40)
    mlp = LlamaMLP(config).to(dtype).requires_grad_(False)
    compare(mlp, fused.mlp_forward, drawn(3, 5, 16, dtype=dtype), dtype)


@pytest.mark.parametrize("activation, installed", [("silu", True), ("gelu", False)])
def test_only_silu_mlps_are_replaced(activation, installed):
    mlp = LlamaMLP(
        LlamaConfig(hidden_size=16, num_attention_heads=4, intermediate_size=40, hidden_act=activation)
    )
    fused.install(nn.Sequential(mlp))
    assert ("forward" in vars(mlp)) == installed


def layer_of(bias=False, dropout=0.0, rslora=False, dora=False):
    model = nn.Sequential(nn.Linear(12, 20, bias=bias))
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], lora_dropout=dropout, use_rslora=rslora, use_dora=dora
    )
    layer = inject_adapter_in_model(config, model, "policy")[0]
    layer.lora_B["policy"].weight.data = drawn(20, 4, seed=5)
    return layer.eval()


@DTYPES
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"rslora": True}, {"dropout": 0.5}])
def test_lora_layer(options, dtype):
    layer = layer_of(**options)
    layer.get_base_layer().to(dtype)
    layer.cast_input_dtype_enabled = False
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        compare(layer, lora_linear.forward, drawn(3, 5, 12, dtype=dtype), dtype)


def test_the_input_may_want_no_gradient():
    layer = layer_of()
    lora_linear.forward(layer, drawn(3, 12)).sum().backward()
    assert layer.lora_A["policy"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["dropout", "dora", "disabled", "no role", "two roles", "merged"])
def test_what_is_not_one_plain_adapter_is_left_to_peft(monkeypatch, how):
    layer = layer_of(dropout=0.5 if how == "dropout" else 0.0, dora=how == "dora")
    if how == "dropout":
        layer.train()
    elif how == "disabled":
        layer.__dict__["_disable_adapters"] = True
    elif how == "no role":
        layer.__dict__["_active_adapter"] = ["other"]
    elif how == "two roles":
        layer.__dict__["_active_adapter"] = ["policy", "other"]
    elif how == "merged":
        layer.merged_adapters = ["policy"]
    called = []
    monkeypatch.setattr(type(layer), "forward", lambda *arguments: called.append(arguments))
    lora_linear.forward(layer, drawn(3, 12))
    assert len(called) == 1
