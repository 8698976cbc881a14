import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.baselines import grpo, reinforce, rloo
from rlhf_exp.algorithms.masked import Moments

RETURNS = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])  # two prompts, three answers each


def test_rloo_by_hand():
    # others of 1: (2 + 6) / 2 = 4; of 2: 3.5; of 6: 1.5; then 0: 1.5, 0: 1.5, 3: 0
    assert_close(rloo(RETURNS, 3), torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))
    assert_close(rloo(torch.tensor([5.0, 1.0]), 2), torch.tensor([4.0, -4.0]))


def test_rloo_is_the_centred_return_times_k_by_k_minus_1():
    returns = torch.randn(20, dtype=torch.float64)
    centred = (returns.view(5, 4) - returns.view(5, 4).mean(1, keepdim=True)).flatten()
    assert_close(rloo(returns, 4), centred * 4 / 3)


def test_the_gradient_of_rloo_is_unbiased():
    """Two answers drawn from a policy over three tokens, enumerated: the mean of A_i grad log p is grad E[R]."""
    logits = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (wanted,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p, total = logits.softmax(0).detach(), torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            advantages = rloo(reward[[i, j]], 2)
            loss = (advantages * logits.log_softmax(0)[[i, j]]).mean()
            total += p[i] * p[j] * torch.autograd.grad(loss, logits)[0]
    assert_close(total, wanted)


def test_grpo_by_hand():
    # first group: mean 3, squares 4 + 1 + 9, std sqrt(14 / 3) = 2.160247; second: mean 1, std sqrt(2)
    std, other = math.sqrt(14 / 3) + 1e-4, math.sqrt(2) + 1e-4
    expected = [-2 / std, -1 / std, 3 / std, -1 / other, -1 / other, 2 / other]
    assert_close(grpo(RETURNS, 3), torch.tensor(expected))


def test_equal_answers_have_no_advantage():
    same = torch.full((4,), 7.0)
    for advantages in (rloo(same, 2), grpo(same, 2)):
        assert (advantages == 0).all()


@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_a_shift_of_a_prompts_rewards_changes_nothing(estimate):
    returns = torch.randn(6, dtype=torch.float64)
    shift = torch.tensor([5.0, 5.0, 5.0, -1.0, -1.0, -1.0])
    assert_close(estimate(returns + shift, 3), estimate(returns, 3))


def test_reinforce_by_hand():
    nothing = Moments(*torch.zeros(3, dtype=torch.float64))
    returns = torch.tensor([1.0, 3.0])
    assert reinforce(returns, nothing).tolist() == [-1, 1]  # the batch's own mean
    earlier = Moments.of(torch.tensor([4.0, 6.0, 8.0]), torch.ones(3, dtype=torch.bool))
    assert reinforce(returns, earlier).tolist() == [-5, -3]


@pytest.mark.parametrize(("count", "k"), [(4, 1), (5, 2), (6, 4)])
def test_groups_must_be_whole(count, k):
    for estimate in (rloo, grpo):
        with pytest.raises(ValueError, match=f"groups of {k}"):
            estimate(torch.zeros(count), k)


def test_one_earlier_return_is_a_baseline():
    one = Moments.of(torch.tensor([4.0]), torch.ones(1, dtype=torch.bool))
    assert reinforce(torch.tensor([1.0, 3.0]), one).tolist() == [-3, -1]


def test_the_baseline_of_reinforce_is_in_float64():
    # 2^24 + 1 is no float32 number: a float32 mean of the three would be 2^24 / 3
    nothing = Moments(*torch.zeros(3, dtype=torch.float64))
    returns = torch.tensor([2.0**24, 1.0, 1.0])
    assert reinforce(returns, nothing)[1] == 1 - (2**24 + 2) / 3
    # float32's .1 is 1.49e-9 above float64's
    tenth = Moments.of(torch.tensor([0.1], dtype=torch.float64), torch.ones(1, dtype=torch.bool))
    assert_close(reinforce(torch.tensor([0.1]), tenth), torch.tensor([1.490116e-9]), rtol=1e-5, atol=0)


def test_dtypes_and_shapes():
    mask = torch.ones(2, dtype=torch.bool)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        returns = torch.tensor([1.0, 1.0078125], dtype=dtype)
        advantages = rloo(returns, 2), grpo(returns, 2), reinforce(returns, Moments.of(returns, mask))
        assert {x.dtype for x in advantages} == {expected}
    for estimate in (
        lambda x: rloo(x, 2),
        lambda x: grpo(x, 2),
        lambda x: reinforce(x, Moments.of(x, x > 0)),
    ):
        with pytest.raises(ValueError, match="returns has shape"):
            estimate(torch.ones(2, 2))
