import math

import pytest
import scipy.special
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.kl import best_of_n_kl, full_kl, kl_divergence_estimate, kl_rewards, next_kl_coef
from rlhf_exp.algorithms.logprob import token_logprobs

NAN = math.nan
KEPT = torch.tensor([True, False, True, True, False])


def enumerated(seed, kept=None):
    """log-probs of all five tokens under a policy and a reference, renormalised on the same kept set."""
    torch.manual_seed(seed)
    logits, ref_logits = 2 * torch.randn(2, 5, dtype=torch.float64)
    tokens = torch.arange(5) if kept is None else torch.arange(5)[kept]
    allowed = None if kept is None else kept.expand(len(tokens), 5)
    return [
        token_logprobs(x.expand(len(tokens), 5), tokens, temperature=0.8, allowed=allowed)
        for x in (logits, ref_logits)
    ]


def test_estimators_by_hand():
    # policy 1/2, reference 1/4: r = 1/2, log r = -.693147
    logprobs, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert_close(kl_divergence_estimate(logprobs, ref), torch.tensor([0.6931472]))
    assert_close(kl_divergence_estimate(logprobs, ref, "k1"), torch.tensor([0.6931472]))
    assert_close(kl_divergence_estimate(logprobs, ref, "k2"), torch.tensor([0.2402265]))  # .480453 / 2
    assert_close(kl_divergence_estimate(logprobs, ref, "k3"), torch.tensor([0.1931472]))  # .5 - 1 + .693147
    # the other way round: r = 2
    assert_close(kl_divergence_estimate(ref, logprobs, "k1"), torch.tensor([-0.6931472]))
    assert_close(kl_divergence_estimate(ref, logprobs, "k3"), torch.tensor([0.3068528]))  # 1 - .693147


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [None, KEPT])
def test_k1_and_k3_are_unbiased_under_a_shared_support(seed, kept):
    logprobs, ref = enumerated(seed, kept)
    probs = logprobs.exp()
    p, q = probs.tolist(), ref.exp().tolist()
    true_kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert true_kl > 0.01
    for estimator in ("k1", "k3"):
        estimate = (probs * kl_divergence_estimate(logprobs, ref, estimator)).sum()
        assert_close(estimate.item(), true_kl, rtol=1e-10, atol=0)
    assert abs((probs * kl_divergence_estimate(logprobs, ref, "k2")).sum() - true_kl) > 1e-3
    # importance ratios of what the policy samples have mean 1
    assert_close((probs * (ref - logprobs).exp()).sum().item(), 1.0, rtol=1e-12, atol=0)


def test_a_support_of_its_own_for_each_model_breaks_the_ratio():
    """Why the sampled support is shared: the policy's kept set is not the other model's."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    policy = token_logprobs(logits.expand(2, 5), torch.tensor([0, 1]), allowed=(logits >= 1).expand(2, 5))
    other = token_logprobs(logits.expand(2, 5), torch.tensor([0, 1]))
    assert (policy.exp() * (other - policy).exp()).sum() < 0.9


def test_k3_is_not_negative_and_exact_for_small_differences():
    logprobs = torch.randn(1000)
    assert (kl_divergence_estimate(logprobs, torch.randn(1000), "k3") >= 0).all()
    # d^2 / 2 for a small d; exp(d) - 1 in float32 would give 0 or 1.2e-7
    tiny = kl_divergence_estimate(torch.zeros(1), torch.full((1,), 1e-3), "k3")
    assert_close(tiny, torch.tensor([5.001667e-7]), rtol=1e-3, atol=0)


def test_no_estimate_is_clamped():
    estimate = kl_divergence_estimate(torch.zeros(2), torch.tensor([30.0, -200.0]), "k1")
    assert estimate.tolist() == [-30, 200]
    assert_close(
        kl_divergence_estimate(torch.zeros(1), torch.tensor([30.0]), "k3")[0].item(), math.exp(30) - 31
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_padding_gives_zero_and_gets_a_zero_gradient(estimator):
    logprobs = torch.tensor([-1.0, NAN, math.inf], requires_grad=True)
    ref = torch.tensor([-2.0, NAN, 1.0])
    mask = torch.tensor([True, False, False])
    kl = kl_divergence_estimate(logprobs, ref, estimator, mask)
    kl.sum().backward()
    assert kl[1:].tolist() == [0, 0]
    assert logprobs.grad[1:].tolist() == [0, 0]
    assert logprobs.grad[0] != 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck(estimator):
    logprobs = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_divergence_estimate(x, ref, estimator), logprobs)


def test_unknown_estimator():
    with pytest.raises(ValueError, match="kl_estimator must be k1, k2 or k3, got 'k4'"):
        kl_divergence_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_full_kl_by_hand_and_by_other_libraries():
    # p = 1/2, 1/2; q = 1/4, 3/4: .5 log 2 + .5 log(2/3) = .346574 - .202733
    p, q = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(3)])
    assert_close(full_kl(p, q), torch.tensor(0.1438410), atol=1e-6, rtol=0)
    p, q = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    distribution = torch.distributions.Categorical
    oracle = torch.distributions.kl_divergence(distribution(logits=p), distribution(logits=q))
    assert_close(full_kl(p, q), oracle)
    rel_entr = scipy.special.rel_entr(p.softmax(-1).numpy(), q.softmax(-1).numpy()).sum(-1)
    assert_close(full_kl(p, q), torch.from_numpy(rel_entr))
    assert (full_kl(p, p) == 0).all()


def test_full_kl_with_removed_tokens():
    removed = torch.tensor([0.0, 0.0, -math.inf])
    q = torch.tensor([0.0, math.log(3), -math.inf])
    assert_close(full_kl(removed, q), torch.tensor(0.1438410), atol=1e-6, rtol=0)
    assert full_kl(torch.zeros(3), removed) == math.inf
    # p = 1/2, 1/2, 0 against 1/3 each: log 3/2
    assert_close(full_kl(removed, torch.zeros(3)), torch.tensor(math.log(1.5)))


@pytest.mark.parametrize("half", [0, 1])
def test_full_kl_of_half_precision_in_float32(half):
    # 1/40 each, and 1/39 each without one token: log(40 / 39) is the difference of two logarithms near 3.7
    p, q = torch.zeros(40), torch.zeros(40)
    p[0] = -math.inf
    given = [x.bfloat16() if i == half else x for i, x in enumerate((p, q))]
    assert_close(full_kl(*given), torch.tensor(math.log(40 / 39)), atol=1e-6, rtol=0)


def test_rewards_by_hand():
    scores = torch.tensor([10.0, -3.0])
    kl = torch.tensor([[1.0, 2.0, NAN], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.tensor([[-0.1, 10 - 0.2, 0.0], [-0.4, -0.5, -3 - 0.6]])
    assert_close(kl_rewards(scores, kl, mask, 0.1), expected)
    assert_close(kl_rewards(scores, kl, mask, torch.tensor(0.1)), expected)


def test_rewards_by_brute_force(lengths_mask):
    lengths = [3, 1, 6, 4]
    scores, kl, mask = torch.randn(4), torch.randn(4, 6), lengths_mask([3, 1, 6, 4], 6)
    rewards = kl_rewards(scores, kl, mask, 0.05)
    for b in range(4):
        for t in range(6):
            expected = 0.0
            if t < lengths[b]:
                expected = -0.05 * kl[b, t].item() + (scores[b].item() if t == lengths[b] - 1 else 0.0)
            assert abs(rewards[b, t] - expected) < 1e-6


def test_rewards_add_up_to_score_minus_coefficient_times_kl(lengths_mask):
    # eq. 2 of the papers is about the whole answer
    scores, kl, mask = torch.randn(4), torch.randn(4, 6), lengths_mask([3, 1, 6, 4], 6)
    total = torch.stack([kl[b][mask[b]].sum() for b in range(4)])
    assert_close(kl_rewards(scores, kl, mask, 0.05).sum(1), scores - 0.05 * total)


def test_rewards_keep_the_dtype_of_kl():
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = kl_rewards(torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, 2), mask, 0.1)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[0, 1]]


def test_a_row_without_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        kl_rewards(torch.zeros(2), torch.zeros(2, 1), torch.tensor([[True], [False]]), 0.1)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="ref_logprobs has shape"):
        kl_divergence_estimate(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="mask has shape"):
        kl_divergence_estimate(torch.zeros(2, 3), torch.zeros(2, 3), "k1", torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="kl has shape"):
        kl_rewards(torch.zeros(2), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), 0.1)
    with pytest.raises(ValueError, match="logits_q has shape"):
        full_kl(torch.zeros(2, 3), torch.zeros(3))


def test_the_controller_by_hand():
    # KL 9 of a target of 6: error .5 is clipped to .2; 64 of 10,000 answers: beta (1 + .2 * .0064)
    assert next_kl_coef(0.2, 9.0, 6.0, 10_000, 64) == pytest.approx(0.2 * 1.00128)
    # KL 6.6: error .1, unclipped; KL 3: -.5 -> -.2; on target nothing changes
    assert next_kl_coef(0.2, 6.6, 6.0, 10_000, 64) == pytest.approx(0.2 * 1.00064)
    assert next_kl_coef(0.2, 3.0, 6.0, 10_000, 64) == pytest.approx(0.2 * (1 - 0.00128))
    assert next_kl_coef(0.2, 6.0, 6.0, 10_000, 64) == 0.2
    # the paper's own K_beta of 0.1
    assert next_kl_coef(1.0, 12.0, 6.0, 10.0, 1) == pytest.approx(1 + 0.1 * 0.2)


def test_the_controller_finds_the_target():
    """A policy whose KL falls as the coefficient rises, KL = 2 / beta, ends at the target from either side."""
    for start in (0.01, 3.0):
        beta = start
        for _ in range(400):
            beta = next_kl_coef(beta, 2 / beta, 6.0, 1000, 100)
        assert 2 / beta == pytest.approx(6.0, rel=1e-3)


def test_target_and_horizon_below_1_are_fine():
    # KL .55 of .5: error .1; 1 answer of a horizon of .5
    assert next_kl_coef(1.0, 0.55, 0.5, 0.5, 1) == pytest.approx(1.2)


def test_one_step_cannot_take_the_coefficient_below_0():
    # 10 answers of a horizon of 2: 1 - .2 * 5 = 0; of 2.25: 1 - .2 * 10 / 2.25 = 1/9
    with pytest.raises(ValueError, match="horizon must be more than a fifth of the 10 episodes, got 2"):
        next_kl_coef(1.0, 0.0, 6.0, 2, 10)
    assert next_kl_coef(1.0, 0.0, 6.0, 2.25, 10) == pytest.approx(1 / 9)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10.0), (6.0, 0.0), (-1.0, 10.0), (math.nan, 10.0)])
def test_target_and_horizon_must_be_positive(target, horizon):
    with pytest.raises(ValueError, match="must be positive"):
        next_kl_coef(0.1, 1.0, target, horizon, 1)


# ---------------------------------------------------------------- best of n


def best_of_n_exactly(n: int, outcomes: int) -> float:
    """KL(best of n || uniform) of equally probable outcomes with different scores, from the definition."""
    total = 0.0
    for i in range(1, outcomes + 1):
        chance = (i / outcomes) ** n - ((i - 1) / outcomes) ** n  # that the highest of n is the i-th
        total += chance * math.log(chance * outcomes)
    return total


def test_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_kl(16) == pytest.approx(2.7725887 - 15 / 16)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n_kl(0)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_is_exact_for_improbable_answers_and_else_a_bound(n):
    assert best_of_n_kl(n) == pytest.approx(best_of_n_exactly(n, 200_000), abs=1e-3)
    for outcomes in (1, 2, 5, 20):
        assert best_of_n_kl(n) >= best_of_n_exactly(n, outcomes)
    assert best_of_n_kl(n) > best_of_n_exactly(n, 2) + 0.01
