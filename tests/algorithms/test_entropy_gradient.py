"""The entropy's gradient through `linear_logprobs`, against autograd on full logits."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.logprob import entropy, linear_logprobs
from rlhf_exp.algorithms.repetition import Repetition
from rlhf_exp.algorithms.support import Support

N, D, V = 7, 5, 11


@pytest.fixture
def case():
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    targets = torch.randint(V, (N,))
    allowed = torch.rand(N, V) < 0.5
    allowed[torch.arange(N), targets] = True
    return hidden.requires_grad_(), weight, targets, allowed


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("chunk", [2, N])
def test_it_is_that_of_the_definition(case, restricted, chunk):
    hidden, weight, targets, allowed = case
    a, b = torch.randn(2, N, dtype=torch.float64)
    support = Support.from_mask(allowed) if restricted else None
    out = linear_logprobs(hidden, weight, None, targets, 0.7, support, None, chunk, entropy_gradient=True)
    (got,) = torch.autograd.grad((a * out.logprobs + b * out.entropy).sum(), hidden)
    logits = hidden @ weight.T
    at = (logits / 0.7).masked_fill(~allowed, -torch.inf) if restricted else logits / 0.7
    logprobs = at.log_softmax(1)[torch.arange(N), targets]
    expected_entropy = entropy(logits, 0.7, allowed if restricted else None)
    (expected,) = torch.autograd.grad((a * logprobs + b * expected_entropy).sum(), hidden)
    assert_close(out.entropy.detach(), expected_entropy.detach())
    assert_close(got, expected)


def test_by_finite_differences_with_suppressed_tokens_and_a_repetition_penalty(case):
    hidden, weight, targets, _ = case
    ids = torch.randint(V, (2, 6))
    repetition = Repetition(
        1.3, ids, torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([2, 3, 4, 1, 2, 5, 6])
    )
    forbidden = next(i for i in range(V) if i not in targets.tolist())
    suppressed = (torch.arange(N) < 4, [forbidden])

    def function(x):
        return linear_logprobs(
            x, weight, None, targets, 0.9, None, suppressed, 3, repetition, entropy_gradient=True
        ).entropy

    assert torch.autograd.gradcheck(function, hidden)


def test_the_uniform_distribution_has_the_most_entropy():
    hidden, weight = torch.zeros(1, D, dtype=torch.float64, requires_grad=True), torch.randn(V, D).double()
    linear_logprobs(hidden, weight, None, torch.tensor([3]), entropy_gradient=True).entropy.sum().backward()
    assert hidden.grad.abs().max() < 1e-12


def test_without_it_the_entropy_has_no_gradient_and_the_log_probs_the_same(case):
    hidden, weight, targets, _ = case
    plain = linear_logprobs(hidden, weight, None, targets)
    more = linear_logprobs(hidden, weight, None, targets, entropy_gradient=True)
    assert not plain.entropy.requires_grad
    assert more.entropy.requires_grad
    gradients = [torch.autograd.grad(out.logprobs.sum(), hidden)[0] for out in (plain, more)]
    assert torch.equal(*gradients)
    assert torch.equal(plain.logprobs, more.logprobs)


def test_bfloat16_states_get_a_gradient_in_bfloat16(case):
    hidden, weight, targets, _ = case
    half, matrix = hidden.detach().bfloat16().requires_grad_(), weight.bfloat16()
    linear_logprobs(half, matrix, None, targets, entropy_gradient=True).entropy.sum().backward()
    wide = half.detach().double().requires_grad_()
    entropy(wide @ matrix.double().T).sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert_close(half.grad.double(), wide.grad, atol=0.05, rtol=0.02)
