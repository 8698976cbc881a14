"""Q and V heads: their formula from the file's tensors, their files bit for bit, their size."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf_exp.errors import InputError
from rlhf_exp.model import shapes
from rlhf_exp.model.ilql_heads import KINDS, ILQLHeads

SIZE, VOCABULARY = 6, 11


@pytest.fixture
def output() -> torch.Tensor:
    return torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(9))


@pytest.fixture(params=KINDS)
def heads(request, output) -> ILQLHeads:
    """Every number another one, so that a confusion of two shows."""
    heads = ILQLHeads(request.param, SIZE, output, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in heads.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return heads


def table(projection) -> torch.Tensor:
    features, weight, bias = projection
    return features @ weight.T + (0 if bias is None else bias)


def by_hand(state: dict[str, torch.Tensor], kind: str, part: str, hidden, output) -> torch.Tensor:
    if kind != "linear":
        hidden = (hidden @ state[f"{part}inner.weight"].T + state[f"{part}inner.bias"]).clamp(min=0)
    hidden = hidden @ state[f"{part}weight"].T
    return hidden @ output.T if kind == "tied" else hidden + state[f"{part}bias"]


def test_q_and_v_from_the_files_tensors(heads, output, tmp_path):
    heads.save(tmp_path / "h.safetensors")
    state, hidden = load_file(tmp_path / "h.safetensors"), torch.randn(4, SIZE)
    for name, found in (("q", heads.twins(hidden)), ("target", heads.targets(hidden))):
        for number in (0, 1):
            expected = by_hand(state, heads.kind, f"{name}.{number}.", hidden, output)
            assert_close(table(found[number]), expected)
            assert expected.shape == (4, VOCABULARY)
    inner = hidden
    if heads.kind != "linear":
        inner = (hidden @ state["v_inner.weight"].T + state["v_inner.bias"]).clamp(min=0)
    assert_close(heads.values(hidden), inner @ state["v_weight"] + state["v_bias"])


def test_saved_and_loaded_they_are_equal_bit_for_bit(heads, output, tmp_path):
    heads.save(tmp_path / "h.safetensors")
    again = ILQLHeads.load(tmp_path / "h.safetensors", SIZE, output)
    assert again.kind == heads.kind
    before, after = heads.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hidden = torch.randn(3, SIZE)
    for one, other in zip(
        [*heads.twins(hidden), *heads.targets(hidden)],
        [*again.twins(hidden), *again.targets(hidden)],
        strict=True,
    ):
        assert torch.equal(table(one), table(other))
    assert torch.equal(heads.values(hidden), again.values(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_the_start(kind, output):
    """The copies are those of the twins, the twins are not those of each other, and another seed has others."""
    heads, same, other = (ILQLHeads(kind, SIZE, output, seed) for seed in (0, 0, 1))
    hidden = torch.randn(3, SIZE)
    twins, copies = ([table(p) for p in find(hidden)] for find in (heads.twins, heads.targets))
    assert all(torch.equal(one, two) for one, two in zip(twins, copies, strict=True))
    assert not torch.equal(*twins)
    assert torch.equal(table(same.twins(hidden)[0]), twins[0])
    assert not torch.equal(table(other.twins(hidden)[0]), twins[0])


def test_what_is_trained(heads, output):
    names = {name for name, p in heads.named_parameters() if any(p is t for t in heads.trainable())}
    assert names == {name for name in heads.state_dict() if not name.startswith("target.")}
    assert all(parameter is not output for parameter in heads.parameters())
    sum(table(p).sum() for p in heads.twins(torch.randn(3, SIZE))).backward()
    assert not output.requires_grad and output.grad is None


def test_the_size_is_what_the_plan_reckons_with(heads):
    counted = sum(p.numel() for p in heads.q[0].parameters() if p.dim() == 2)
    assert counted == shapes.q_head(heads.kind, SIZE, VOCABULARY)


def test_a_file_that_is_no_such_heads(heads, output, tmp_path):
    path = tmp_path / "h.safetensors"
    with pytest.raises(InputError, match="does not hold ILQL heads"):
        ILQLHeads.load(path, SIZE, output)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="does not hold ILQL heads"):
        ILQLHeads.load(path, SIZE, output)
    heads.save(path)
    with pytest.raises(InputError, match="does not hold ILQL heads for this model"):
        ILQLHeads.load(path, SIZE + 1, torch.zeros(VOCABULARY, SIZE + 1))


def test_bfloat16_states_give_float32(heads):
    hidden = torch.randn(3, SIZE).bfloat16()
    assert heads.values(hidden).dtype == torch.float32
    assert all(p.features.dtype == torch.float32 for p in heads.twins(hidden))
