"""Logits whose sums are not rounded to bfloat16, against float64."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.algorithms import logits
from rlhf_exp.algorithms.logits import OutputLayer, bfloat16_factors, rows_at_once
from rlhf_exp.algorithms.logprob import linear_logprobs


def problem(n=7, v=50, d=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((n, d), (v, d), (v,)))
    return (3 * hidden).to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_and_kept_in_float32(dtype, biased):
    hidden, weight, bias = problem(dtype=dtype)
    bias = bias if biased else None
    exact = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = OutputLayer(weight, bias, hidden.dtype)(hidden.requires_grad_())
    assert found.dtype == torch.float32 and not found.requires_grad
    assert (found - exact).abs().max() < 1e-4
    # what the product in half precision makes of them: the test can tell
    assert ((hidden @ weight.T).double() - hidden.double() @ weight.double().T).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_stay_in_their_dtype(dtype):
    hidden, weight, bias = problem(dtype=dtype)
    found = OutputLayer(weight, bias, hidden.dtype)(hidden)
    assert found.dtype == dtype
    assert (found - (hidden.double() @ weight.double().T + bias.double())).abs().max() < 1e-4


def test_float32_states_are_not_rounded_by_a_bfloat16_weight():
    hidden, weight, _ = problem()
    hidden = hidden.float() + 1e-3
    assert (
        OutputLayer(weight, None, hidden.dtype)(hidden) - hidden.double() @ weight.double().T
    ).abs().max() < 1e-4


def test_the_setting_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(KeyError), bfloat16_factors():
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_rows_at_once(monkeypatch):
    monkeypatch.setattr(logits, "LOGIT_BUDGET", 101)
    assert rows_at_once(torch.empty(50, 4)) == 2
    assert rows_at_once(torch.empty(102, 4)) == 1  # a vocabulary larger than the budget


def test_a_layer_that_was_made_before_knows_what_of():
    hidden, weight, bias = problem()
    layer = OutputLayer(weight, bias, torch.bfloat16)
    targets = torch.arange(len(hidden))
    found = linear_logprobs(hidden, weight, bias, targets, layer=layer).logprobs
    assert torch.equal(found, linear_logprobs(hidden, weight, bias, targets).logprobs)
    assert layer.is_of(weight, torch.bfloat16)
    assert not layer.is_of(weight, torch.float32) and not layer.is_of(weight.clone(), torch.bfloat16)
    weight.mul_(2)
    assert not layer.is_of(weight, torch.bfloat16)
    with pytest.raises(ValueError, match="another weight"):
        linear_logprobs(hidden, weight, bias, targets, layer=layer)
