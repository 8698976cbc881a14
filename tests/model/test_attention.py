"""Attention by blocks against softmax(QK^T)V written out in float64, and inside every architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf_exp.model import attention as ours
from tests.model.architectures import TABLE, small_base

MODULE = SimpleNamespace(is_causal=True)
# half a unit in the last of bfloat16's 8 places, of the largest; twice, for what is rounded on the way
CLOSE = 2**-8


def drawn(b, heads, groups, length, keys, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (b, heads, length, size),
        (b, groups, keys, size),
        (b, groups, keys, size),
        (b, length, heads, size),
    ]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def written_out(query, key, value, seen, scale):
    """[b, H, t, h], seen bool[b, 1, t, L]: row by row, head by head."""
    query, key, value = (x.double() for x in (query, key, value))
    share = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = scale * query[:, head] @ key[:, head // share].transpose(1, 2)
        heads.append(scores.masked_fill(~seen[:, 0], -1e30).softmax(dim=2) @ value[:, head // share])
    return torch.stack(heads, dim=2)


def causal(b, length, keys):
    """Query i of the last `length` places sees the keys up to its own place."""
    return torch.tensor(
        [[[[j <= keys - length + i for j in range(keys)] for i in range(length)]] for _ in range(b)]
    )


def padded_left(b, length):
    seen = causal(b, length, length)
    for row in range(b):
        seen[row, :, :, : row % length] = False
    return seen


def near(found, wanted):
    return (found.double() - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize(
    "b, heads, groups, length",
    [(3, 4, 4, 5), (2, 6, 2, 7), (2, 4, 1, 9), (3, 2, 2, 1), (1, 2, 1, 300), (40, 8, 4, 130)],
)
def test_forward_and_gradients(b, heads, groups, length, scaling, monkeypatch):
    """One block, several of rows, several of queries (128 each), groups, the last one shorter."""
    tensors = drawn(b, heads, groups, length, length, 16)
    grad = tensors.pop()
    low = [x.clone().requires_grad_() for x in tensors]
    high = [x.double().requires_grad_() for x in tensors]
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)  # not by the kernel
    found, _ = ours.attention(MODULE, *low, None, scaling=scaling)
    wanted = written_out(*high, causal(b, length, length), scaling or 16**-0.5)
    found.backward(grad)
    wanted.backward(grad.double())
    assert near(found, wanted)
    for x, y in zip(low, high, strict=True):
        assert near(x.grad, y.grad)


@pytest.mark.parametrize("length", [6, 140])
def test_masked_rows(length, monkeypatch):
    tensors = drawn(5, 4, 2, length, length, 8)
    grad = tensors.pop()
    seen = padded_left(5, length)
    real = seen.any(dim=3).transpose(1, 2)[
        ..., None
    ]  # queries on padding see nothing: their output is not used
    low = [x.clone().requires_grad_() for x in tensors]
    high = [x.double().requires_grad_() for x in tensors]
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", None)
    found, _ = ours.attention(MODULE, *low, seen)
    wanted = written_out(*high, seen, 8**-0.5)
    assert found.isfinite().all()
    assert near(found * real, wanted * real)
    (found * real * grad).sum().backward()
    (wanted * real * grad).sum().backward()
    for x, y in zip(low, high, strict=True):
        assert near(x.grad, y.grad)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_over_a_cache(heads, groups, masked):
    query, key, value, _ = drawn(3, heads, groups, 1, 11, 8)
    seen = causal(3, 1, 11)
    if masked:
        seen[1, :, :, :4] = False
    found, _ = ours.attention(MODULE, query, key, value, seen if masked else None)
    wanted = written_out(query, key, value, seen, 8**-0.5)
    assert (found.double() - wanted).abs().max() <= 2 * CLOSE * wanted.abs().max()  # scores are rounded, too


def test_autocast_does_not_round_inside():
    tensors = drawn(2, 4, 4, 20, 20, 16)[:3]
    plain, _ = ours.attention(MODULE, *(x.clone().requires_grad_() for x in tensors), None)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = ours.attention(MODULE, *(x.clone().requires_grad_() for x in tensors), None)
    assert torch.equal(plain, cast)


def test_what_is_not_plain_goes_to_the_kernel(monkeypatch):
    called = []
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        lambda *arguments, **_: called.append(arguments[4]) or (None, None),
    )
    low, high = drawn(2, 4, 4, 5, 5, 8)[:3], [x.float() for x in drawn(2, 4, 4, 5, 5, 8)[:3]]
    seen = causal(2, 5, 5)
    ours.attention(MODULE, *high, None)  # float32
    ours.attention(MODULE, *low, None, dropout=0.1)
    ours.attention(MODULE, *low, None, softcap=30.0)
    ours.attention(MODULE, *low, None, is_causal=False)
    ours.attention(MODULE, *low, seen.float())  # an additive mask, as ALiBi's
    ours.attention(MODULE, *low, seen.expand(2, 4, 5, 5))  # a mask a head
    assert len(called) == 6
    ours.attention(MODULE, *low, seen)
    assert len(called) == 6


@pytest.mark.parametrize("name", sorted(TABLE))
def test_inside_every_architecture(name):
    """Hidden states by our attention are as near to float32's as the kernel's are, padded on the left too."""
    base = small_base(name)
    model = base.model.bfloat16()
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    masks = [None, torch.arange(12)[None] >= torch.tensor([0, 3, 5])[:, None]]
    by_kernel = [model(input_ids=ids, attention_mask=mask).logits.float() for mask in masks]
    before = model.config._attn_implementation
    ours.install(model)
    assert model.config._attn_implementation == (ours.NAME if before == "sdpa" else before)
    for mask, wanted in zip(masks, by_kernel, strict=True):
        found = model(input_ids=ids, attention_mask=mask).logits.float()
        if mask is not None:
            found, wanted = found[mask], wanted[mask]
        assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
