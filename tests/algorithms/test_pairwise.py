import math

import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.pairwise import (
    centering_loss,
    compared_tokens,
    held,
    pairwise_accuracy,
    pairwise_loss,
    token_wise_loss,
    wilson_interval,
)


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


def test_label_smoothing_by_hand():
    # difference 1: .3132617 and, swapped, 1.3132617; 0.9 and 0.1 of them
    loss = pairwise_loss(torch.tensor([2.0]), torch.tensor([1.0]), label_smoothing=0.1)
    assert_close(loss, torch.tensor(0.9 * 0.3132617 + 0.1 * 1.3132617))


def test_label_smoothing_is_the_mean_loss_when_that_share_of_labels_is_swapped():
    chosen, rejected = torch.randn(2, 10, dtype=torch.float64)
    expected = 0.8 * pairwise_loss(chosen, rejected) + 0.2 * pairwise_loss(rejected, chosen)
    assert_close(pairwise_loss(chosen, rejected, label_smoothing=0.2), expected)
    # its minimum is where the odds are those of the labels: sigmoid(d) = .8
    best = torch.tensor([math.log(4)], dtype=torch.float64, requires_grad=True)
    pairwise_loss(best, torch.zeros(1, dtype=torch.float64), label_smoothing=0.2).backward()
    assert abs(best.grad) < 1e-12


@pytest.mark.parametrize("wrong", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_lies_below_a_half(wrong):
    with pytest.raises(ValueError, match="label_smoothing"):
        pairwise_loss(torch.zeros(1), torch.zeros(1), label_smoothing=wrong)


def test_centering_by_hand():
    # (2 + 1)^2 = 9, (0 - 4)^2 = 16
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, -4.0])
    assert centering_loss(chosen, rejected) == 12.5
    assert centering_loss(chosen, rejected, denominator=5) == 5
    assert centering_loss(chosen, -chosen) == 0  # whatever their difference is


# ids of two pairs, right-padded with 9 = a real token elsewhere: only lengths say where a sequence ends
CHOSEN = torch.tensor([[1, 2, 3, 4, 9, 9], [1, 2, 9, 9, 9, 9], [5, 6, 7, 9, 9, 9], [5, 6, 9, 9, 9, 9]])
REJECTED = torch.tensor([[1, 2, 5, 9, 9, 9], [1, 2, 9, 9, 3, 9], [5, 6, 7, 9, 9, 9], [5, 6, 9, 9, 9, 9]])
LENGTHS = torch.tensor([4, 2, 3, 2]), torch.tensor([3, 5, 3, 4])


def test_what_is_compared_by_hand():
    compared = [[i for i, on in enumerate(row) if on] for row in compared_tokens(CHOSEN, REJECTED, *LENGTHS)]
    # differ at place 2 and one is longer; one ends at 2; equal: the last; the padding's 9s equal the other's tokens
    assert compared == [[2, 3], [2, 3, 4], [2], [2, 3]]
    swapped = compared_tokens(REJECTED, CHOSEN, *LENGTHS[::-1])
    assert torch.equal(swapped, compared_tokens(CHOSEN, REJECTED, *LENGTHS))


def test_an_ended_answer_keeps_its_score():
    scores = torch.tensor([[1.0, 2.0, math.nan, math.nan], [3.0, 4.0, 5.0, 6.0]])
    assert held(scores, torch.tensor([2, 4])).tolist() == [[1, 2, 2, 2], [3, 4, 5, 6]]


def test_token_wise_by_hand():
    chosen, rejected = torch.tensor([[9.0, 1.0, 0.0], [5.0, 0.0, 7.0]]), torch.zeros(2, 3)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    # pair 1: mean of log(1 + e^-1) and log 2; pair 2: log 2
    first, second = (0.3132617 + math.log(2)) / 2, math.log(2)
    assert_close(token_wise_loss(chosen, rejected, mask), torch.tensor((first + second) / 2))
    assert_close(token_wise_loss(chosen, rejected, mask, denominator=8), torch.tensor((first + second) / 8))


def test_token_wise_margins_by_hand():
    # differences 2 and 1 less the margin 1: log(1 + e^-1) and log 2; the other pair has the margin 0: log(1 + e^-1)
    chosen, rejected = torch.tensor([[2.0, 1.0], [1.0, 9.0]]), torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    loss = token_wise_loss(chosen, rejected, mask, margin=torch.tensor([1.0, 0.0]))
    assert_close(loss, torch.tensor(((0.3132617 + math.log(2)) / 2 + 0.3132617) / 2))
    with pytest.raises(ValueError, match="margin has shape"):
        token_wise_loss(chosen, rejected, mask, margin=torch.zeros(3))


def token_wise_case():
    torch.manual_seed(1)
    scores = torch.randn(8, 6, dtype=torch.float64)
    mask = compared_tokens(CHOSEN, REJECTED, *LENGTHS)
    return scores[:4], scores[4:], mask


def test_token_wise_by_brute_force():
    """The loop of the published recipes, over the real scores and the held ones."""
    chosen, rejected, mask = token_wise_case()
    expected = 0.0
    for b, (first, last) in enumerate([(2, 4), (2, 5), (2, 3), (2, 4)]):
        parts = []
        for t in range(first, last):
            c, r = (
                side[b, min(t, int(lengths[b]) - 1)].item()
                for side, lengths in zip((chosen, rejected), LENGTHS, strict=True)
            )
            parts.append(math.log(1 + math.exp(r - c)))
        expected += sum(parts) / len(parts) / 4
    got = token_wise_loss(held(chosen, LENGTHS[0]), held(rejected, LENGTHS[1]), mask)
    assert abs(got.item() - expected) < 1e-12


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e30])
def test_padding_changes_neither_the_token_wise_loss_nor_its_gradient(fill):
    found = []
    for value in (0.0, fill):
        chosen, rejected, mask = token_wise_case()
        spoiled = []
        for side, lengths in zip((chosen, rejected), LENGTHS, strict=True):
            real = torch.arange(6) < lengths.unsqueeze(1)
            spoiled.append(torch.where(real, side, value).requires_grad_())
        sides = (held(side, lengths) for side, lengths in zip(spoiled, LENGTHS, strict=True))
        loss = token_wise_loss(*sides, mask, label_smoothing=0.1)
        loss.backward()
        found.append([loss.detach(), *(side.grad for side in spoiled)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_micro_batches_of_the_token_wise_loss_add_up():
    chosen, rejected, mask = token_wise_case()
    parts = [token_wise_loss(chosen[i : i + 1], rejected[i : i + 1], mask[i : i + 1], 4) for i in range(4)]
    assert_close(sum(parts), token_wise_loss(chosen, rejected, mask))


def test_a_pair_without_a_compared_token_is_an_error():
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        token_wise_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([[True], [False]]))


def test_what_is_the_same_again_after_a_difference_is_compared():
    chosen, rejected = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([[1, 9, 3, 4], [1, 2, 3, 9]])
    mask = compared_tokens(chosen, rejected, torch.tensor([4, 4]), torch.tensor([4, 4]))
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]


def test_only_pairs_without_a_compared_token_are_named():
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        token_wise_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


def test_nan_outside_the_mask_reaches_no_gradient():
    chosen = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    token_wise_loss(chosen, torch.zeros(1, 2), torch.tensor([[False, True]])).backward()
    # -sigmoid(-1)
    assert_close(chosen.grad, torch.tensor([[0.0, -0.2689414]]))


def test_an_infinite_difference_costs_nothing():
    assert pairwise_loss(torch.tensor([math.inf]), torch.zeros(1)) == 0


def test_arguments_of_the_other_losses_are_checked():
    one, two = torch.zeros(1, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="rejected has shape"):
        token_wise_loss(two, one, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="rejected has shape"):
        compared_tokens(two, one, torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="lengths has shape"):
        held(two, torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="rejected has shape"):
        centering_loss(torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match="denominator"):
        token_wise_loss(two, two, torch.ones(2, 2, dtype=torch.bool), denominator=0)
    with pytest.raises(ValueError, match="denominator"):
        centering_loss(torch.zeros(2), torch.zeros(2), denominator=0)
