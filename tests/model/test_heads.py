from __future__ import annotations

import pytest
import torch

from rlhf_exp.errors import InputError
from rlhf_exp.model.heads import ScalarHead


def test_forward_by_hand():
    head = ScalarHead(2)
    head.weight.data = torch.tensor([2.0, -1.0])
    head.bias.data = torch.tensor(0.5)
    hidden = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    # 2 * 1 - 3 + .5 = -.5, and the bias alone
    assert head(hidden).tolist() == [[-0.5, 0.5]]
    assert head(hidden).dtype == torch.float32


def test_starts_at_zero_and_draws_with_variance_one_over_d_plus_one():
    assert ScalarHead(4)(torch.ones(3, 4)).tolist() == [0, 0, 0]
    weight = ScalarHead(20_000).reset(seed=3).weight.detach()
    # standard error of a variance of n normals: var * sqrt(2 / n) = 1 %
    assert abs(float(weight.var()) * 20_001 - 1) < 0.04
    assert torch.equal(weight, ScalarHead(20_000).reset(seed=3).weight)
    assert not torch.equal(weight, ScalarHead(20_000).reset(seed=4).weight)


def test_save_and_load_are_bit_for_bit(tmp_path):
    head = ScalarHead(7).reset(1)
    head.bias.data += 0.1
    head.save(tmp_path / "head.safetensors")
    loaded = ScalarHead.load(tmp_path / "head.safetensors")
    assert torch.equal(loaded.weight, head.weight)
    assert torch.equal(loaded.bias, head.bias)


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_no_head_is_named(tmp_path, content):
    path = tmp_path / "head.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"head\.safetensors is not a scalar head"):
        ScalarHead.load(path)
