import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.gae import gae


def ragged(lengths_mask):
    return torch.randn(4, 7), torch.randn(4, 7), lengths_mask([7, 1, 4, 0], 7)


def test_by_hand():
    # gamma = lam = 1/2
    # delta_2 = 3 + 0 - 2 = 1, delta_1 = 2 + .5 * 2 - 1 = 2, delta_0 = 1 + .5 * 1 - .5 = 1
    # A_2 = 1, A_1 = 2 + .25 * 1 = 2.25, A_0 = 1 + .25 * 2.25 = 1.5625
    rewards = torch.tensor([[1.0, 2.0, 3.0, math.nan]])
    values = torch.tensor([[0.5, 1.0, 2.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    out = gae(rewards, values, mask, 0.5, 0.5)
    assert_close(out.advantages, torch.tensor([[1.5625, 2.25, 1.0, 0.0]]))
    assert_close(out.returns, torch.tensor([[2.0625, 3.25, 3.0, 0.0]]))


def test_gamma_and_lam_are_told_apart_by_hand():
    # gamma 1, lam 1/2: delta_1 = 2 - 1 = 1, delta_0 = 0 + 1 * 1 - 4 = -3; A_0 = -3 + .5 * 1
    arguments = torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 1.0]]), torch.tensor([[True, True]])
    assert gae(*arguments, gamma=1.0, lam=0.5).advantages.tolist() == [[-2.5, 1.0]]
    # gamma 1/2, lam 1: delta_0 = 0 + .5 * 1 - 4 = -3.5; A_0 = -3.5 + .5 * 1
    assert gae(*arguments, gamma=0.5, lam=1.0).advantages.tolist() == [[-3.0, 1.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.0, 0.9)])
def test_equation_16_by_brute_force(gamma, lam, lengths_mask):
    rewards, values, mask = ragged(lengths_mask)
    out = gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate([7, 1, 4, 0]):
        r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
        for t in range(7):
            advantage = sum(
                (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in range(length - t)
            )
            assert abs(out.advantages[b, t] - advantage) < 1e-5
            assert abs(out.returns[b, t] - (advantage + v[t] if t < length else 0)) < 1e-5


def test_lam_1_gives_the_discounted_reward_to_go(lengths_mask):
    # another formula: the values cancel
    rewards, values, mask = ragged(lengths_mask)
    returns = gae(rewards, values, mask, 0.9, 1.0).returns
    for b, length in enumerate([7, 1, 4, 0]):
        for t in range(length):
            expected = sum(0.9**k * rewards[b, t + k].item() for k in range(length - t))
            assert abs(returns[b, t] - expected) < 1e-5


def test_lam_0_gives_the_one_step_target(lengths_mask):
    rewards, values, mask = ragged(lengths_mask)
    returns = gae(rewards, values, mask, 0.9, 0.0).returns
    assert_close(returns[0, :6], rewards[0, :6] + 0.9 * values[0, 1:])
    assert_close(returns[0, 6], rewards[0, 6])
    assert_close(returns[2, 3], rewards[2, 3])


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e30])
def test_contents_of_padding_do_not_matter(fill, lengths_mask):
    rewards, values, mask = ragged(lengths_mask)
    expected = gae(rewards, values, mask, 0.9, 0.8)
    spoiled = [torch.where(mask, x, fill) for x in (rewards, values)]
    out = gae(*spoiled, mask, 0.9, 0.8)
    assert_close(out, expected, rtol=0, atol=0)
    assert all((x[~mask] == 0).all() for x in out)


def test_more_padding_and_fewer_rows_change_nothing(lengths_mask):
    rewards, values, mask = ragged(lengths_mask)
    whole = gae(rewards, values, mask, 0.9, 0.8)
    row = gae(rewards[2:3, :4], values[2:3, :4], mask[2:3, :4], 0.9, 0.8)
    assert_close(row.advantages, whole.advantages[2:3, :4])
    assert_close(row.returns, whole.returns[2:3, :4])


def test_targets_are_constants_in_float32_or_wider():
    mask = torch.ones(1, 3, dtype=torch.bool)
    values = torch.randn(1, 3, dtype=torch.bfloat16, requires_grad=True)
    out = gae(torch.randn(1, 3), values, mask, 1.0, 0.95)
    assert all(not x.requires_grad and x.dtype == torch.float32 for x in out)
    assert gae(torch.randn(1, 3).double(), values.double(), mask, 1.0, 0.95).returns.dtype == torch.float64


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True]])
def test_rows_that_are_not_right_padded_are_an_error(row):
    mask = torch.tensor([[True, True, False], row])
    with pytest.raises(ValueError, match=r"rows \[1\] of mask are not right-padded"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), mask, 1.0, 1.0)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_gamma_and_lam_in_range(bad):
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="gamma must lie in"):
        gae(x, x, mask, bad, 1.0)
    with pytest.raises(ValueError, match="lam must lie in"):
        gae(x, x, mask, 1.0, bad)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="values has shape"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool), 1.0, 1.0)


def test_half_precision_is_computed_in_float32():
    # .9 * V_1 = .9 * 1.0078125 = .90703125 is no bf16 number
    rewards, mask = torch.zeros(1, 2).bfloat16(), torch.ones(1, 2, dtype=torch.bool)
    out = gae(rewards, torch.tensor([[0.0, 1.0078125]]).bfloat16(), mask, 0.9, 0.0)
    assert out.advantages.dtype == torch.float32
    assert_close(out.advantages, torch.tensor([[0.90703125, -1.0078125]]))


def test_an_answer_of_one_token():
    out = gae(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[True]]), 0.9, 0.9)
    assert (out.advantages.tolist(), out.returns.tolist()) == ([[2.0]], [[3.0]])
