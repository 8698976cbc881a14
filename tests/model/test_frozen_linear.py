"""Frozen linear layers: as torch's in numbers and gradients, left alone where they are not frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_exp.algorithms import product
from rlhf_exp.model import frozen_linear


@pytest.fixture
def layers(monkeypatch):
    """(with the forward, a plain one of the same weights)."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    for module in (product, frozen_linear):
        monkeypatch.setattr(module, "onednn", lambda: True)
    torch.manual_seed(0)
    plain = nn.Linear(7, 11)
    ours = nn.Linear(7, 11)
    ours.load_state_dict(plain.state_dict())
    frozen_linear.install(ours.requires_grad_(False))
    assert "forward" in vars(ours)
    return ours, plain.requires_grad_(False)


def test_numbers_and_gradients(layers):
    ours = layers[0]
    xs = [torch.linspace(-2, 3, 42).view(2, 3, 7).requires_grad_() for _ in layers]
    outs = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    assert torch.allclose(*outs, rtol=0, atol=1e-5)
    for out in outs:
        (out * torch.arange(66.0).view(2, 3, 11)).sum().backward()
    assert torch.allclose(xs[0].grad, xs[1].grad, rtol=1e-5, atol=1e-4)
    assert not ours(xs[0].detach()).requires_grad
    with torch.no_grad():
        assert not ours(xs[0]).requires_grad


def test_a_weight_that_learns_gets_its_gradient(layers):
    ours, _ = layers
    ours.requires_grad_(True)
    x = torch.ones(4, 7)
    ours(x).sum().backward()
    assert torch.equal(ours.weight.grad, torch.full((11, 7), 4.0))
    assert torch.equal(ours.bias.grad, torch.full((11,), 4.0))


def test_autocast_is_obeyed(layers):
    ours, plain = layers
    x = torch.ones(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), plain(x))


def test_only_where_it_changes_something(monkeypatch):
    monkeypatch.setattr(frozen_linear, "onednn", lambda: False)
    layer = nn.Linear(3, 2)
    frozen_linear.install(layer)
    assert "forward" not in vars(layer)
    monkeypatch.setattr(frozen_linear, "onednn", lambda: True)
    layer = nn.Linear(3, 2).bfloat16()
    frozen_linear.install(layer)
    assert "forward" not in vars(layer)
