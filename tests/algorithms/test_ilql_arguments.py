"""What the functions of ILQL take and refuse: dtypes, ranges, shapes, chunks, and who has a gradient."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms import ilql, logits
from rlhf_exp.algorithms.ilql import (
    awac_loss,
    awac_weights,
    bellman_loss,
    bellman_targets,
    decoding_bonus,
    expectile_loss,
    polyak_update,
    taken_q,
    taken_q_and_nll,
    terminal_rewards,
    token_loss,
)


def test_half_precision_is_computed_in_float32():
    """Numbers whose products bf16 would round: 1.0078125 is one, its square and its half square are not."""
    x, one = torch.tensor([[1.0078125]]).bfloat16(), torch.ones(1, 1, dtype=torch.bool)
    zero, exact = torch.zeros_like(x), 1.0078125
    assert terminal_rewards(x[:, 0], one).dtype == torch.float32
    two = torch.ones(1, 2, dtype=torch.bool)
    targets = bellman_targets(zero.expand(1, 2), x.expand(1, 2), two, 0.9)
    assert_close(targets, torch.tensor([[0.9 * exact, 0.0]]))
    assert_close(bellman_loss(x, zero, one, 1), torch.tensor(exact**2))
    assert_close(expectile_loss(zero, x, one, 0.5, 1), torch.tensor(exact**2 / 2))
    assert_close(awac_loss(x, x, one, 1), torch.tensor(-(exact**2)))
    features, weight, action = x.expand(1, 2), x.expand(3, 2), torch.tensor([0])
    assert_close(taken_q(features, weight, None, action), torch.tensor([2 * exact**2]))
    # three equal logits, whatever they are rounded to
    found = taken_q_and_nll(features, weight, None, action)
    assert_close(found.nll, torch.tensor([math.log(3)]), atol=1e-6, rtol=0)
    assert found.q.dtype == torch.float32


def test_bfloat16_states_under_a_float32_layer():
    features, weight = torch.randn(2, 3).bfloat16(), torch.randn(5, 3)
    found = taken_q_and_nll(features, weight, None, torch.tensor([1, 4]))
    assert_close(found.q, (features.float() @ weight.T)[[0, 1], [1, 4]])


def test_float64_rewards_stay_float64():
    rewards = terminal_rewards(torch.tensor([0.1], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool))
    assert rewards.tolist() == [[0.0, 0.1]]


def test_constants_have_no_gradient_themselves():
    x, mask = torch.randn(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    assert not bellman_targets(x, x, mask, 0.9).requires_grad
    assert not awac_weights(x, x, 1.0).requires_grad
    assert not bellman_loss(torch.zeros(1, 2), x, mask, 1).requires_grad
    assert not awac_loss(torch.zeros(1, 2), x, mask, 1).requires_grad


def test_polyak_on_parameters():
    target = torch.nn.Parameter(torch.tensor([1.0]))
    polyak_update([target], [torch.nn.Parameter(torch.tensor([3.0]))], 0.5)
    assert target.tolist() == [2.0]


def test_all_of_the_range_of_gamma_and_nothing_else(lengths_mask):
    rewards, values, mask = torch.zeros(1, 2), torch.ones(1, 2), lengths_mask([2], 2)
    assert bellman_targets(rewards, values, mask, 0).tolist() == [[0, 0]]
    assert bellman_targets(rewards, values, mask, 1).tolist() == [[1, 0]]
    for bad in (-0.5, 1.5):
        with pytest.raises(ValueError, match="gamma must lie in"):
            bellman_targets(rewards, values, mask, bad)


def test_the_row_with_a_gap_is_named():
    x, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [False, True, True]])
    with pytest.raises(ValueError, match=r"rows \[1\] of mask are not right-padded"):
        bellman_targets(x, x, mask, 1.0)


@pytest.mark.parametrize("denominator", [0, -1])
def test_denominators_must_be_positive(denominator):
    x, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    for loss in (
        lambda: bellman_loss(x, x, mask, denominator),
        lambda: expectile_loss(x, x, mask, 0.5, denominator),
        lambda: awac_loss(x, x, mask, denominator),
        lambda: token_loss(x, mask, denominator),
    ):
        with pytest.raises(ValueError, match="denominator"):
            loss()


def test_shapes_are_checked():
    x, row, mask = torch.zeros(2, 2), torch.zeros(1, 2), torch.ones(2, 2, dtype=torch.bool)
    actions = torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda: terminal_rewards(torch.zeros(1), mask),
        lambda: bellman_targets(x, row, mask, 1.0),
        lambda: bellman_loss(x, row, mask, 1),
        lambda: expectile_loss(x, row, mask, 0.5, 1),
        lambda: taken_q(row, x, None, actions),
        lambda: taken_q_and_nll(row, x, None, actions),
        lambda: awac_weights(x, row, 1.0),
        lambda: awac_loss(x, row, mask, 1),
        lambda: decoding_bonus(x, torch.zeros(1), 1.0),
    ):
        with pytest.raises(ValueError, match="has shape"):
            call()


def products(monkeypatch, features, weight, actions, chunk=None):
    """Positions of each product with the output layer, forward and backward."""
    sizes, linear = [], ilql.F.linear

    def spy(x, *rest):
        sizes.append(len(x))
        return linear(x, *rest)

    monkeypatch.setattr(ilql.F, "linear", spy)
    taken_q_and_nll(features, weight, None, actions, chunk).nll.sum().backward()
    monkeypatch.setattr(ilql.F, "linear", linear)
    return sizes


def test_the_default_chunk_stays_within_the_budget(monkeypatch):
    features, weight = torch.randn(7, 3, requires_grad=True), torch.randn(5, 3)
    actions = torch.zeros(7, dtype=torch.int64)
    monkeypatch.setattr(logits, "LOGIT_BUDGET", 4 * 5 + 1)
    assert sorted(products(monkeypatch, features, weight, actions)) == [3, 3, 4, 4]  # forward and backward
    monkeypatch.setattr(logits, "LOGIT_BUDGET", 1)  # a vocabulary larger than the budget
    assert products(monkeypatch, features, weight, actions) == [1] * 14


def test_one_chunk_is_computed_once(monkeypatch):
    features, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    assert products(monkeypatch, features, weight, torch.zeros(4, dtype=torch.int64), 4) == [4]


def test_chunks_can_be_asked_for_a_gradient():
    features, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    found = taken_q_and_nll(features, weight, None, torch.zeros(4, dtype=torch.int64), 2)
    (got,) = torch.autograd.grad(found.q.sum(), features)
    assert_close(got, weight[0].expand(4, 3))


def test_targets_are_zero_on_padding_whatever_stands_there():
    given = torch.tensor([[2.0, math.nan, 5.0]]), torch.tensor([[1.0, math.nan, 7.0]])
    mask = torch.tensor([[True, False, False]])
    assert bellman_targets(*given, mask, 0.5).tolist() == [[2.0, 0.0, 0.0]]


def test_token_loss_by_hand():
    losses, mask = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[True, True, False]])
    assert token_loss(losses, mask, 6) == 0.5


def test_the_bonus_is_the_advantage_times_beta():
    bonus = decoding_bonus(torch.tensor([[1.0, 4.0]]), torch.tensor([3.0]), 2.0)
    assert bonus.tolist() == [[-4.0, 2.0]]
