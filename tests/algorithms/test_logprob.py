import math

import pytest
import scipy.special
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.logprob import entropy, token_logprobs

# Probabilities 1/8, 2/8, 5/8
LOGITS = torch.tensor([0.0, math.log(2), math.log(5)])
ALLOWED = torch.tensor([True, True, False])


def test_token_logprobs_by_hand():
    targets = torch.tensor([0, 1, 2])
    assert_close(token_logprobs(LOGITS.expand(3, 3), targets).exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8]))
    # temperature 2 takes square roots of 1, 2, 5: sum 1 + 1.41421 + 2.23607 = 4.65028
    assert_close(
        token_logprobs(LOGITS.expand(3, 3), targets, temperature=2).exp(),
        torch.tensor([0.215041, 0.304114, 0.480846]),
        atol=1e-6,
        rtol=0,
    )
    # without the third token: 1/3, 2/3
    assert_close(
        token_logprobs(LOGITS.expand(2, 3), targets[:2], allowed=ALLOWED.expand(2, 3)).exp(),
        torch.tensor([1 / 3, 2 / 3]),
    )


def test_entropy_by_hand():
    # -(1/8 log 1/8 + 1/4 log 1/4 + 5/8 log 5/8) = .259930 + .346574 + .293752
    assert_close(entropy(LOGITS), torch.tensor(0.900256), atol=1e-6, rtol=0)
    # 1/3, 2/3: log 3 - 2/3 log 2
    assert_close(entropy(LOGITS, allowed=ALLOWED), torch.tensor(math.log(3) - 2 / 3 * math.log(2)))
    assert_close(entropy(torch.zeros(7)), torch.tensor(math.log(7)))
    # at temperature .5 the probabilities go as 1, 4, 25
    expected = sum(-n / 30 * math.log(n / 30) for n in (1, 4, 25))
    assert_close(entropy(LOGITS, temperature=0.5), torch.tensor(expected))


def test_brute_force_and_other_libraries():
    logits, targets = 3 * torch.randn(4, 6, 11), torch.randint(11, (4, 6))
    logprobs = token_logprobs(logits, targets, temperature=0.7)
    oracle = scipy.special.log_softmax(logits.double().numpy() / 0.7, axis=-1)
    categorical = torch.distributions.Categorical(logits=logits.double() / 0.7)
    for b in range(4):
        for t in range(6):
            exps = [math.exp(v / 0.7) for v in logits[b, t].tolist()]
            assert abs(logprobs[b, t] - math.log(exps[targets[b, t]] / sum(exps))) < 1e-5
            assert abs(logprobs[b, t] - oracle[b, t, targets[b, t]]) < 1e-5
    assert_close(entropy(logits, 0.7).double(), categorical.entropy(), atol=1e-5, rtol=0)


def test_equals_logits_set_to_minus_infinity():
    logits = torch.randn(5, 9)
    allowed = torch.rand(5, 9) < 0.5
    allowed[:, 4] = True
    removed = logits.masked_fill(~allowed, -math.inf)
    targets = torch.full((5,), 4)
    assert_close(token_logprobs(logits, targets, allowed=allowed), token_logprobs(removed, targets))
    assert_close(entropy(logits, allowed=allowed), entropy(removed))


def test_softmax_in_float32_and_float64_is_kept():
    # 40 tokens with logit 0: log(1/40); a bf16 softmax is off in the third digit
    logits = torch.zeros(1, 40, dtype=torch.bfloat16)
    logprobs = token_logprobs(logits, torch.tensor([3]))
    assert logprobs.dtype == entropy(logits).dtype == torch.float32
    assert_close(logprobs, torch.tensor([-math.log(40)]))
    assert token_logprobs(logits.double(), torch.tensor([3])).dtype == torch.float64


def test_gradcheck():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets, allowed = torch.tensor([0, 1, 2]), torch.tensor([True, True, True, False, False]).expand(3, 5)
    for restricted in (None, allowed):
        check = torch.autograd.gradcheck
        assert check(lambda x, a=restricted: token_logprobs(x, targets, 1.3, a), logits)
        assert check(lambda x, a=restricted: entropy(x, 1.3, a), logits)


@pytest.mark.parametrize("target", [-100, -1, 3, 151_643])
def test_target_outside_the_vocabulary(target):
    with pytest.raises(
        ValueError, match=rf"target {target} at position \[1\] is outside the vocabulary of 3"
    ):
        token_logprobs(LOGITS.expand(2, 3), torch.tensor([2, target]))


def test_the_first_bad_target_is_named():
    with pytest.raises(ValueError, match=r"target 7 at position \[0, 1\] is outside the vocabulary"):
        token_logprobs(LOGITS.expand(2, 2, 3), torch.tensor([[0, 7], [8, 1]]))
    with pytest.raises(ValueError, match=r"target 2 at position \[0, 1\] is outside its support \(2 such"):
        token_logprobs(
            LOGITS.expand(2, 2, 3), torch.tensor([[0, 2], [2, 1]]), allowed=ALLOWED.expand(2, 2, 3)
        )


def test_results_have_the_shape_of_the_targets():
    logits, targets = torch.randn(2, 1, 4, 3), torch.ones(2, 1, 4, dtype=torch.int32)
    assert token_logprobs(logits, targets).shape == (2, 1, 4)
    assert entropy(logits).shape == (2, 1, 4)
    allowed = ALLOWED.expand(2, 1, 4, 3)
    assert_close(token_logprobs(logits, targets, allowed=allowed), logits[..., :2].log_softmax(-1)[..., 1])


def test_target_outside_allowed():
    with pytest.raises(ValueError, match=r"target 2 at position \[1, 0\] is outside its support \(1 such"):
        token_logprobs(LOGITS.expand(2, 1, 3), torch.tensor([[0], [2]]), allowed=ALLOWED.expand(2, 1, 3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(LOGITS.expand(1, 3), torch.tensor([0]), temperature)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="targets has shape"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="allowed has shape"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2).long(), allowed=torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="allowed has shape"):
        entropy(torch.zeros(2, 3), allowed=torch.ones(3, dtype=torch.bool))
