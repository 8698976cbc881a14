"""Products with a frozen weight, by whichever library is the faster one here."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.algorithms import product
from rlhf_exp.algorithms.product import linear


@pytest.fixture(params=[False, True], ids=["torch's own", "oneDNN"])
def way(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(product, "onednn", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (0, 7), (64, 7)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_products(way, shape, biased, dtype):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=draw).to(dtype), torch.randn(11, 7, generator=draw).to(dtype)
    bias = torch.arange(11.0, dtype=dtype) if biased else None
    exact = torch.einsum("...i,oi->...o", x.double(), weight.double())
    exact = exact + (0 if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.shape == (*shape[:-1], 11) and found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5)


def test_a_transposed_weight_and_rows_of_a_larger_tensor(way):
    draw = torch.Generator().manual_seed(1)
    x, weight = torch.randn(20, 9, generator=draw), torch.randn(7, 11, generator=draw)
    found = linear(x[::2, 1:8], weight.T)
    exact = x[::2, 1:8].double() @ weight.double()
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5)


def test_only_float32_on_a_cpu_goes_to_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    taken, sound = [], torch.ops.mkldnn._linear_pointwise

    def spy(x, *more):
        taken.append(x.ndim)
        return sound(x, *more)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    monkeypatch.setattr(product, "onednn", lambda: True)

    def asked(x, weight):
        taken.clear()
        linear(x, weight)
        return list(taken)

    x, weight = torch.ones(2, 3, 7), torch.ones(11, 7)
    assert asked(x, weight) == [2]  # two axes, whatever x has
    assert asked(x.double(), weight.double()) == []
    assert asked(x.bfloat16(), weight.bfloat16()) == []
    assert asked(x.to("meta"), weight.to("meta")) == []
    assert asked(x[:0], weight) == []


def test_which_processors(monkeypatch, tmp_path):
    for mkl in (False, True):
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda mkl=mkl: mkl)
        for vendor, expected in (
            ("AuthenticAMD", mkl),
            ("HygonGenuine", mkl),
            ("GenuineIntel", False),
            ("", False),
        ):
            monkeypatch.setattr(product, "vendor", lambda vendor=vendor: vendor)
            assert product.onednn.__wrapped__() is (expected and torch.backends.mkldnn.is_available())


def test_the_vendor_is_read_of_what_linux_says(monkeypatch):
    text = (
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 2\n\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n"
    )
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: text)
    assert product.vendor() == "AuthenticAMD"
    monkeypatch.setattr("pathlib.Path.read_text", lambda self: "processor : 0\n")
    assert product.vendor() == ""

    def missing(self):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert product.vendor() == ""
