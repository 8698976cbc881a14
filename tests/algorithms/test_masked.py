import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.masked import (
    Moments,
    last_token,
    masked_mean,
    masked_sum,
    masked_var,
    sequence_weights,
    whiten,
)

NAN, INF = math.nan, math.inf
X = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, NAN]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_and_mean_by_hand():
    assert masked_sum(X, MASK) == 9  # 1 + 2 + 6
    assert masked_sum(X, MASK, dim=1).tolist() == [3, 6]
    assert masked_sum(X, MASK, dim=0).tolist() == [7, 2, 0]
    assert masked_mean(X, MASK) == 3  # 9 / 3
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 6]


def test_var_by_hand():
    # mean 3, deviations -2, -1, 3: squares 4 + 1 + 9 = 14
    assert_close(masked_var(X, MASK), torch.tensor(14 / 3))
    assert_close(masked_var(X, MASK, unbiased=True), torch.tensor(7.0))


def test_mean_of_nothing_is_nan():
    assert masked_mean(X, torch.zeros_like(MASK)).isnan()


def test_sum_counts_beyond_bfloat16():
    # 257 is not a bf16 number: a bf16 sum of 257 ones is 256.
    ones = torch.ones(257, dtype=torch.bfloat16)
    assert masked_sum(ones, torch.ones(257, dtype=torch.bool)).item() == 257


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_var])
def test_gradient_is_that_of_the_selected_and_zero_on_padding(reduce):
    oracle = {
        masked_sum: torch.sum,
        masked_mean: torch.mean,
        masked_var: lambda x: torch.var(x, correction=0),
    }[reduce]
    x = X.clone().requires_grad_()
    reduce(x, MASK).backward()
    selected = X[MASK].requires_grad_()
    oracle(selected).backward()
    assert_close(x.grad[MASK], selected.grad)
    assert (x.grad[~MASK] == 0).all()


def test_gradcheck():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for function in (masked_sum, masked_mean, masked_var, whiten_with_constant_moments):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, MASK), x)


def whiten_with_constant_moments(x, mask):
    return whiten(x, mask, Moments.of(torch.arange(6.0).view(2, 3), mask))


def test_moments_by_hand():
    moments = Moments.of(torch.tensor([1.0, 2.0, 3.0, NAN]), torch.tensor([True, True, True, False]))
    assert [m.item() for m in moments] == [3, 6, 14]  # count, 1 + 2 + 3, 1 + 4 + 9
    assert moments.mean == 2
    assert_close(moments.var().item(), 2 / 3)  # (1 + 0 + 1) / 3
    assert_close(moments.var(unbiased=True).item(), 1.0)


def test_merged_moments_equal_those_of_the_whole(lengths_mask):
    x, mask = torch.randn(6, 9), lengths_mask([9, 1, 4, 7, 2, 9], 9)
    whole = Moments.of(x, mask)
    parts = [Moments.of(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    assert_close(parts[0].merge(parts[1]).merge(parts[2]), whole)
    assert_close(parts[0].merge(parts[1].merge(parts[2])), whole)
    # the all-reduce that ranks would do
    assert_close(Moments(*torch.stack([torch.stack(part) for part in parts]).sum(0)), whole)
    assert_close(whole.mean, x[mask].double().mean())
    assert_close(whole.var(unbiased=True), x[mask].double().var())


def test_nothing_merges_as_zero():
    x, mask = torch.randn(4), torch.ones(4, dtype=torch.bool)
    assert_close(Moments.of(x, mask).merge(Moments.of(x, ~mask)), Moments.of(x, mask))


def test_moments_keep_the_variance_beside_a_large_mean():
    x = 1e4 + torch.randn(20_000)
    mask = torch.ones(20_000, dtype=torch.bool)
    halves = Moments.of(x[:7000], mask[:7000]).merge(Moments.of(x[7000:], mask[7000:]))
    expected = x.double().var(correction=0)  # two passes in float64, another formula
    assert_close(halves.var(), expected, rtol=1e-6, atol=0)
    assert_close(masked_var(x, mask).double(), expected, rtol=1e-3, atol=0)


def test_variance_of_constant_data_is_not_negative():
    for constant in (0.1, 0.3, 1e4 + 0.1):
        x = torch.full((7,), constant, dtype=torch.float64)
        mask = torch.ones(7, dtype=torch.bool)
        assert 0 <= Moments.of(x, mask).var() < 1e-6
        assert whiten(x, mask).abs().max() < 1e-3


def test_moments_have_no_gradient():
    x = torch.randn(3, requires_grad=True)
    assert not any(m.requires_grad for m in Moments.of(x, torch.ones(3, dtype=torch.bool)))


def test_whiten_by_hand():
    x, mask = torch.tensor([0.0, 4.0, NAN]), torch.tensor([True, True, False])
    # mean 2, variance 4
    assert_close(whiten(x, mask), torch.tensor([-1.0, 1.0, 0.0]))
    assert_close(whiten(x, mask, shift_mean=False), torch.tensor([1.0, 3.0, 0.0]))  # 2 - 1, 2 + 1
    # variance 4 + eps 12 = 16
    assert_close(whiten(x, mask, eps=12), torch.tensor([-0.5, 0.5, 0.0]))


def test_whitened_has_mean_0_and_variance_1_over_the_tokens_that_count(lengths_mask):
    mask = lengths_mask([5, 2, 7], 7)
    x = torch.where(mask, 3 + 5 * torch.randn(3, 7), NAN)
    whitened = whiten(x, mask)
    kept = whitened[mask].double()
    assert abs(kept.mean()) < 1e-6
    assert abs(kept.var(correction=0) - 1) < 1e-6
    assert (whitened[~mask] == 0).all()
    unshifted = whiten(x, mask, shift_mean=False)[mask].double()
    assert_close(unshifted.mean(), x[mask].double().mean(), rtol=1e-6, atol=0)
    assert abs(unshifted.var(correction=0) - 1) < 1e-5


def test_whiten_has_no_offset_beside_a_large_mean():
    x = 1e5 + torch.randn(5000)
    whitened = whiten(x, torch.ones(5000, dtype=torch.bool))
    assert abs(whitened.double().mean()) < 1e-6


def test_whiten_in_micro_batches_with_global_moments_equals_the_whole(lengths_mask):
    x, mask = torch.randn(4, 5), lengths_mask([5, 1, 3, 4], 5)
    moments = Moments.of(x, mask)
    parts = [whiten(x[i : i + 1], mask[i : i + 1], moments) for i in range(4)]
    assert_close(torch.cat(parts), whiten(x, mask))
    assert whiten(x.bfloat16(), mask, moments).dtype == torch.bfloat16


def test_last_token_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]).bool()
    assert last_token(mask).tolist() == [1, 3, 2]


def test_last_token_names_the_empty_rows():
    with pytest.raises(ValueError, match=r"rows \[0, 2\]"):
        last_token(torch.tensor([[False, False], [True, False], [False, False]]))


def test_sequence_weights_give_the_mean_of_sequence_means(lengths_mask):
    mask = lengths_mask([1, 4, 0], 4)
    weights = sequence_weights(mask)
    assert_close(weights, torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.0] * 4]))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, Moments.of, whiten])
def test_shapes_are_checked(function):
    with pytest.raises(ValueError, match="mask has shape"):
        function(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def test_shapes_are_checked_with_given_moments_and_for_rows():
    row = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask has shape"):
        whiten(torch.zeros(2, 3), row, Moments.of(torch.zeros(3), row))
    for function in (last_token, sequence_weights):
        with pytest.raises(ValueError, match=r"expected \[B, T\]"):
            function(torch.ones(2, 2, 2, dtype=torch.bool))


def test_variance_of_half_precision_in_float32():
    # 0, 1, 1: mean 2/3, squares 4/9 + 1/9 + 1/9; a bf16 deviation has 3 digits
    var = masked_var(torch.tensor([0.0, 1.0, 1.0]).bfloat16(), torch.ones(3, dtype=torch.bool))
    assert var.dtype == torch.float32
    assert_close(var, torch.tensor(2 / 9))


def test_the_default_of_eps_is_1e_8():
    # deviations of 1e-4 have the variance 1e-8: 1e-4 / sqrt(2e-8)
    whitened = whiten(torch.tensor([1e-4, -1e-4]), torch.ones(2, dtype=torch.bool))
    assert_close(whitened, torch.tensor([math.sqrt(0.5), -math.sqrt(0.5)]))


def test_last_token_of_a_row_of_one():
    assert last_token(torch.tensor([[True, False, False]])).tolist() == [0]
