"""The repetition penalty in `linear_logprobs`: against autograd through all the logits, and transformers."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import RepetitionPenaltyLogitsProcessor

from rlhf_exp.algorithms.logprob import linear_logprobs, token_logprobs
from rlhf_exp.algorithms.repetition import Repetition, penalise
from rlhf_exp.algorithms.support import Support
from tests.algorithms.test_linear_logprobs import LargestTensor

D, V = 6, 23
LENGTHS = (4, 9, 6)  # of the three sequences; the padding behind them is token 22
FIRST = (2, 5, 1)  # the answers start here


def problem(dtype=torch.float32, penalty=1.7):
    """hidden, weight, bias, targets, repetition and, as Python sets, the tokens before each position."""
    torch.manual_seed(1)
    ids = torch.full((3, max(LENGTHS)), 22)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(9, (length,))  # few tokens, so that some come twice
    places = [(row, t) for row in range(3) for t in range(FIRST[row], LENGTHS[row])]
    row, position = (torch.tensor(column) for column in zip(*places, strict=True))
    before = [set(ids[r, :t].tolist()) for r, t in places]
    hidden, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((len(places), D), (V, D), (V,)))
    return hidden, weight, bias, ids[row, position], Repetition(penalty, ids, row, position), before


def plain(logits, before, penalty):
    """Token by token, out of place, as the paper says it."""
    rows = []
    for n, tokens in enumerate(before):
        rows.append(
            torch.stack(
                [
                    x if token not in tokens else x / penalty if x > 0 else x * penalty
                    for token, x in enumerate(logits[n])
                ]
            )
        )
    return torch.stack(rows)


def test_by_hand():
    # logits log 4, -log 2, 0, log 9; tokens 0 and 1 came before; penalty 2: log 2, -log 4, 0, log 9
    weight = torch.tensor([[math.log(4), 1.0], [-math.log(2), 2.0], [0.0, 3.0], [math.log(9), 4.0]])
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    repetition = Repetition(2.0, torch.tensor([[0, 1, 0, 3]]), torch.tensor([0]), torch.tensor([3]))
    out = linear_logprobs(hidden, weight, None, torch.tensor([0]), repetition=repetition)
    # 2 + 1/4 + 1 + 9 = 12.25
    assert_close(out.logprobs.detach().exp(), torch.tensor([2 / 12.25]))
    assert_close(out.kept_mass, torch.tensor([1.0]))
    out.logprobs.sum().backward()
    # (onehot - p) times 1/2, 2, 1, 1; second column 1, 2, 3, 4
    expected = (10.25 * 0.5 * 1 - 0.25 * 2 * 2 - 1 * 3 - 9 * 4) / 12.25
    assert_close(hidden.grad[0, 1], torch.tensor(expected))


@pytest.mark.parametrize("penalty", [1.7, 0.6])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("restricted", [True, False])
def test_equals_autograd_through_all_the_logits(penalty, chunk_size, restricted):
    hidden, weight, bias, targets, repetition, before = problem(torch.float64, penalty)
    allowed = (torch.rand(len(hidden), V) < 0.4).scatter(1, targets[:, None], True) if restricted else None
    support = Support.from_mask(allowed) if restricted else None
    upstream = torch.randn(len(hidden), dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = linear_logprobs(
        ours, weight, bias, targets, 0.7, support, chunk_size=chunk_size, repetition=repetition
    )
    logits = plain(theirs @ weight.T + bias, before, penalty)
    expected = token_logprobs(logits, targets, 0.7, allowed)
    assert_close(out.logprobs, expected)
    probs = (logits / 0.7).softmax(1)
    mass = probs if allowed is None else probs * allowed
    assert_close(out.kept_mass, mass.sum(1).detach())
    assert_close(out.entropy, torch.special.entr(mass / mass.sum(1, keepdim=True)).sum(1).detach())
    (out.logprobs * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert_close(ours.grad, theirs.grad)
    without = linear_logprobs(hidden, weight, bias, targets, 0.7, support)
    assert (without.logprobs - out.logprobs).abs().max() > 0.1


def test_gradcheck():
    hidden, weight, bias, targets, repetition, _ = problem(torch.float64)
    suppressed = (torch.arange(len(hidden)) < 2, [21])
    assert torch.autograd.gradcheck(
        lambda h: (
            linear_logprobs(
                h, weight, bias, targets, 0.8, None, suppressed, chunk_size=3, repetition=repetition
            ).logprobs
        ),
        hidden.requires_grad_(),
    )


@pytest.mark.parametrize("restricted", [True, False])
def test_gradcheck_of_the_entropy(restricted):
    hidden, weight, bias, targets, repetition, _ = problem(torch.float64)
    allowed = (torch.rand(len(hidden), V) < 0.5).scatter(1, targets[:, None], True)
    support = Support.from_mask(allowed) if restricted else None

    def both(h):
        keywords = {"chunk_size": 4, "repetition": repetition, "entropy_gradient": True}
        return linear_logprobs(h, weight, bias, targets, 0.8, support, **keywords)[:2]

    assert torch.autograd.gradcheck(both, hidden.requires_grad_())


def test_equals_the_processor_of_transformers():
    hidden, weight, bias, targets, repetition, _ = problem(penalty=1.3)
    scores = hidden @ weight.T + bias
    expected = []
    for n, (row, length) in enumerate(zip(repetition.row, repetition.length, strict=True)):
        processor = RepetitionPenaltyLogitsProcessor(1.3)
        expected.append(processor(repetition.ids[row : row + 1, :length], scores[n : n + 1].clone())[0])
    expected = token_logprobs(torch.stack(expected), targets)
    assert_close(linear_logprobs(hidden, weight, bias, targets, repetition=repetition).logprobs, expected)


def test_padding_and_what_comes_later_do_not_count():
    hidden, weight, bias, targets, repetition, _ = problem()
    before = linear_logprobs(hidden, weight, bias, targets, repetition=repetition)
    ids = repetition.ids.clone()
    last = dict(zip(repetition.row.tolist(), repetition.length.tolist(), strict=True))
    for row, length in last.items():  # from the last penalised token on
        ids[row, length:] = 3
    after = linear_logprobs(hidden, weight, bias, targets, repetition=repetition._replace(ids=ids))
    assert_close(after, before, atol=0, rtol=0)


def test_a_penalty_of_1_changes_nothing():
    hidden, weight, bias, targets, repetition, _ = problem(penalty=1.0)
    got = linear_logprobs(hidden, weight, bias, targets, repetition=repetition)
    assert_close(got, linear_logprobs(hidden, weight, bias, targets), atol=0, rtol=0)


def test_nothing_larger_than_a_chunk_of_logits():
    hidden, weight, bias, targets, repetition, _ = problem()
    with LargestTensor() as largest:
        arguments = (hidden.requires_grad_(), weight, bias, targets)
        linear_logprobs(*arguments, chunk_size=2, repetition=repetition).logprobs.sum().backward()
    # the weight has 138 numbers, two rows of logits 46, all logits 276
    assert largest.numel <= V * D < len(hidden) * V


def test_derivative_at_zero_is_that_of_the_division():
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    factors = penalise(logits, torch.tensor([[0, 1, 2, 2]]), 4.0)
    assert factors.tolist() == [[0.25, 0.25, 4.0, 4.0]]
    assert logits.tolist() == [[0.0, 0.25, -4.0]]


def test_what_does_not_fit_is_refused():
    hidden, weight, bias, targets, repetition, _ = problem()

    def call(**changes):
        linear_logprobs(hidden, weight, bias, targets, repetition=repetition._replace(**changes))

    with pytest.raises(ValueError, match="penalty must be positive, got 0"):
        call(penalty=0)
    with pytest.raises(ValueError, match="lengths before a position must be from 1 to 9"):
        call(length=torch.zeros_like(repetition.length))
    with pytest.raises(ValueError, match="lengths before a position must be from 1 to 9"):
        call(length=repetition.length + 5)
    with pytest.raises(ValueError, match="lengths before a position must be from 1 to 9"):
        call(length=repetition.length.scatter(0, torch.tensor([4]), 0))  # one alone
    with pytest.raises(ValueError, match="outside the vocabulary of 23"):
        call(ids=repetition.ids + 1)
    with pytest.raises(ValueError, match="outside the vocabulary of 23"):
        call(ids=repetition.ids.where(repetition.ids != 22, -1).index_fill(1, torch.tensor([8]), 22))
    with pytest.raises(ValueError, match="has 1 positions, not 11"):
        call(row=repetition.row[:1], length=repetition.length[:1])
    with pytest.raises(ValueError, match="length has shape"):
        call(length=repetition.length[:1])


def test_one_token_repeated_is_fine():
    hidden, weight, bias, targets, repetition, before = problem()
    same = repetition._replace(ids=torch.full_like(repetition.ids, 3))
    got = linear_logprobs(hidden, weight, bias, targets, repetition=same)
    logits = plain(hidden @ weight.T + bias, [{3}] * len(before), repetition.penalty)
    assert_close(got.logprobs, token_logprobs(logits, targets))
