import math

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.pairwise import pairwise_accuracy, pairwise_loss, wilson_interval


def test_loss_by_hand():
    # differences 1 and -2: log(1 + e^-1) = .3132617, log(1 + e^2) = 2.1269280; mean 1.2200949
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 2.0])
    assert_close(pairwise_loss(chosen, rejected), torch.tensor(1.2200949))
    assert_close(pairwise_loss(chosen, rejected, denominator=8), torch.tensor(2.4401897 / 8))
    # margins 1 and 0 make the differences 0 and -2
    margin = torch.tensor([1.0, 0.0])
    assert_close(pairwise_loss(chosen, rejected, margin), torch.tensor((math.log(2) + 2.1269280) / 2))


def test_loss_by_brute_force():
    chosen, rejected, margin = torch.randn(3, 20)
    expected = 0.0
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True):
        expected -= math.log(1 / (1 + math.exp(-(c - r - m)))) / 20
    assert abs(pairwise_loss(chosen, rejected, margin) - expected) < 1e-6


def test_equal_scores_give_log_2_and_half_the_gradient():
    chosen = torch.full((4,), 3.0, requires_grad=True)
    rejected = torch.full((4,), 3.0, requires_grad=True)
    loss = pairwise_loss(chosen, rejected)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(math.log(2)))
    assert_close(chosen.grad, torch.full((4,), -0.5 / 4))
    assert_close(rejected.grad, torch.full((4,), 0.5 / 4))


def test_a_common_shift_changes_nothing():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64)
    assert_close(pairwise_loss(chosen + 7, rejected + 7), pairwise_loss(chosen, rejected))


def test_extreme_scores_stay_finite():
    chosen = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(2), denominator=1)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(1000.0))
    assert chosen.grad.tolist() == [-1, 0]


def test_micro_batches_add_up_to_the_large_batch():
    chosen, rejected = torch.randn(2, 5)
    parts = [pairwise_loss(chosen[i], rejected[i], denominator=5) for i in (slice(0, 4), slice(4, 5))]
    assert_close(sum(parts), pairwise_loss(chosen, rejected))


def test_gradcheck():
    chosen, rejected, margin = torch.randn(3, 4, dtype=torch.float64)
    function = torch.autograd.gradcheck
    assert function(
        lambda c, r: pairwise_loss(c, r, margin), (chosen.requires_grad_(), rejected.requires_grad_())
    )


def test_loss_in_float32():
    # .68536; a bf16 loss could only be .68359 or .6875
    loss = pairwise_loss(torch.tensor([4.0]).bfloat16(), torch.tensor([3.984375]).bfloat16())
    assert_close(loss, torch.tensor(math.log1p(math.exp(-0.015625))))


def test_accuracy_by_hand():
    # win, loss, tie, win: (1 + 0 + .5 + 1) / 4
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert pairwise_accuracy(chosen, rejected) == 0.625
    assert pairwise_accuracy(torch.zeros(9), torch.zeros(9)) == 0.5


@pytest.mark.parametrize("swap", [False, True])
def test_accuracy_does_not_hide_nan(swap):
    pair = torch.tensor([1.0, math.nan]), torch.tensor([0.0, 0.0])
    assert pairwise_accuracy(*(reversed(pair) if swap else pair)).isnan()
    assert pairwise_accuracy(torch.zeros(0), torch.zeros(0)).isnan()


def test_wilson_by_hand():
    # 8 of 10, z^2 = 3.841459: centre (.8 + .192073) / 1.384146 = .716740,
    # half 1.959964 * sqrt(.016 + .00960365) / 1.384146 = .226577
    assert wilson_interval(8, 10) == pytest.approx((0.490163, 0.943317), abs=2e-6)
    # 4,995 pairs at .71892: +-1.25 points
    low, high = wilson_interval(0.71892 * 4995, 4995)
    assert (high - low) / 2 == pytest.approx(0.0125, abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 10), (10, 10), (8, 10), (3, 7), (7412, 10_000)])
def test_wilson_equals_scipy(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_stays_within_0_and_1():
    for n in range(1, 300):
        assert wilson_interval(0, n).low >= 0
        assert wilson_interval(n, n).high <= 1


def test_wilson_with_half_successes_lies_between():
    lows = [wilson_interval(s, 10).low for s in (4, 4.5, 5)]
    assert lows == sorted(lows)
    assert wilson_interval(5, 10).low == pytest.approx(1 - wilson_interval(5, 10).high)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="rejected has shape"):
        pairwise_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="margin has shape"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="chosen has shape"):
        pairwise_accuracy(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="denominator"):
        pairwise_loss(torch.zeros(0), torch.zeros(0))
