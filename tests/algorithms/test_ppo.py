import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.masked import sequence_weights
from rlhf_exp.algorithms.ppo import PolicyLoss, explained_variance, policy_loss, value_loss

NAN = math.nan
RATIOS = torch.tensor([1.5, 0.5, 0.5, 1.5, 1.1])
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
ALL = torch.ones(5, dtype=torch.bool)


def policy_case(lengths_mask, dtype=torch.float32):
    """logprobs, old_logprobs, advantages, mask with ratios on both sides of the clip."""
    mask = lengths_mask([6, 1, 4, 3], 6)
    old = -torch.rand(4, 6, dtype=dtype)
    return old + 0.4 * torch.randn(4, 6, dtype=dtype), old, torch.randn(4, 6, dtype=dtype), mask


def value_case(lengths_mask, dtype=torch.float32):
    mask = lengths_mask([6, 1, 4, 3], 6)
    return *(torch.randn(4, 6, dtype=dtype) for _ in range(3)), mask


def test_policy_loss_by_hand():
    # cliprange .2: losses max(-A r, -A clip(r))
    #   A  1, r 1.5: max(-1.5, -1.2) = -1.2 cut     A  1, r .5: max(-.5, -.8) = -.5
    #   A -1, r  .5: max(.5, .8) = .8 cut           A -1, r 1.5: max(1.5, 1.2) = 1.5
    #   A  2, r 1.1: -2.2                           sum -1.6, over a denominator of 10
    out = policy_loss(RATIOS.log(), torch.zeros(5), ADVANTAGES, ALL, 0.2, 0.2, denominator=10)
    assert_close(out.loss, torch.tensor(-0.16))
    assert_close(out.clipfrac, torch.tensor(0.2))  # 2 / 10
    assert_close(out.ratio_mean, torch.tensor(0.51))  # 5.1 / 10
    assert_close(out.ratio_max, torch.tensor(1.5))
    # (r - 1) - log r: .0945349 at 1.5, .1931472 at .5, .0046898 at 1.1;
    # 2 * .0945349 + 2 * .1931472 + .0046898 = .5800540
    assert_close(out.approxkl, torch.tensor(0.0580054), atol=1e-6, rtol=0)


def test_the_two_bounds_by_hand():
    # r 1.5 with A 1 is clipped at 1 + high = 1.4; r .5 with A -1 at 1 - low = .9
    out = policy_loss(RATIOS.log(), torch.zeros(5), ADVANTAGES, ALL, 0.1, 0.4, denominator=1)
    assert_close(out.loss, torch.tensor(-1.4 - 0.5 + 0.9 + 1.5 - 2.2))


def test_ratios_beyond_what_exp_can_hold_give_numbers():
    # A = 1: clipped at 1.2 and 0 gradient; A = -1: e^20, whose gradient ends at the bound; ratio 0: loss 0
    logprobs = torch.tensor([100.0, 100.0, -math.inf, 19.0]).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    out = policy_loss(logprobs, torch.zeros(4), advantages, ALL[:4], 0.2, 0.2, 1)
    wanted = -1.2 + math.exp(20) - math.exp(-20) + math.exp(19)
    assert_close(out.loss.detach(), torch.tensor(wanted))
    assert_close(out.ratio_max, torch.tensor(math.exp(20)))
    out.loss.backward()
    assert_close(logprobs.grad, torch.tensor([0.0, 0.0, 0.0, math.exp(19)]))


def test_dual_clip_by_hand():
    # A = -2, c = 3: losses 10 and 5 are bounded at 6; A = 1 is not touched
    ratios, advantages = torch.tensor([5.0, 2.5, 1.0]), torch.tensor([-2.0, -2.0, 1.0])
    logprobs = ratios.log().requires_grad_()
    out = policy_loss(logprobs, torch.zeros(3), advantages, ALL[:3], 0.2, 0.2, 1, dual_clip=3.0)
    assert_close(out.loss.detach(), torch.tensor(6.0 + 5.0 - 1.0))
    assert out.clipfrac == 1
    out.loss.backward()
    assert_close(logprobs.grad, torch.tensor([0.0, 5.0, -1.0]))
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(logprobs, torch.zeros(3), advantages, ALL[:3], 0.2, 0.2, 1, dual_clip=1.0)


def test_dual_clip_leaves_positive_advantages_alone():
    arguments = (torch.tensor([8.0, 0.01]).log(), torch.zeros(2), torch.tensor([1.0, 1.0]), ALL[:2])
    plain = policy_loss(*arguments, 0.2, 0.2, 1)
    assert_close(policy_loss(*arguments, 0.2, 0.2, 1, dual_clip=2.0), plain)
    # A = 1/2: the bound of -1 would be below -.5 * 1.2
    arguments = (torch.tensor([1.5]).log(), torch.zeros(1), torch.tensor([0.5]), ALL[:1])
    assert_close(policy_loss(*arguments, 0.2, 0.2, 1, dual_clip=2.0).loss, torch.tensor(-0.6))


def test_a_loss_at_the_bound_of_the_dual_clip_is_not_cut():
    logprobs = torch.tensor([0.75], requires_grad=True)
    ratio = logprobs.detach().exp().item()
    out = policy_loss(logprobs, torch.zeros(1), -torch.ones(1), ALL[:1], 0.2, 0.2, 1, dual_clip=ratio)
    assert out.loss == ratio
    assert out.clipfrac == 0
    out.loss.backward()
    assert logprobs.grad == ratio


def test_policy_loss_by_brute_force(lengths_mask):
    logprobs, old, advantages, mask = policy_case(lengths_mask)
    out = policy_loss(logprobs, old, advantages, mask, 0.2, 0.3, denominator=14)
    loss, clipped_tokens, kl, ratios = 0.0, 0, 0.0, []
    for b in range(4):
        for t in range(6):
            if not mask[b, t]:
                continue
            d, a = (logprobs[b, t] - old[b, t]).item(), advantages[b, t].item()
            ratio = math.exp(d)
            objective = min(a * ratio, a * min(max(ratio, 0.8), 1.3))
            clipped_tokens += objective < a * ratio - 1e-9
            loss, kl = loss - objective, kl + math.exp(d) - 1 - d
            ratios.append(ratio)
    assert clipped_tokens > 1
    expected = PolicyLoss(loss / 14, kl / 14, clipped_tokens / 14, sum(ratios) / 14, max(ratios))
    for got, want in zip(out, expected, strict=True):
        assert abs(got.item() - want) < 1e-5


def test_ratio_1_gives_the_policy_gradient(lengths_mask):
    _, old, advantages, mask = policy_case(lengths_mask)
    logprobs = old.clone().requires_grad_()
    out = policy_loss(logprobs, old, advantages, mask, 0.2, 0.2, denominator=14)
    out.loss.backward()
    assert_close(logprobs.grad, torch.where(mask, -advantages / 14, 0))  # grad of -A log pi
    assert out.approxkl == 0
    assert out.clipfrac == 0
    assert_close(out.ratio_mean.detach(), torch.tensor(1.0))
    assert out.ratio_max == 1


def test_clipped_tokens_get_no_gradient():
    logprobs = RATIOS.log().requires_grad_()
    policy_loss(logprobs, torch.zeros(5), ADVANTAGES, ALL, 0.2, 0.2, denominator=1).loss.backward()
    # -A r where it is not clipped
    assert_close(logprobs.grad, torch.tensor([0.0, -0.5, 0.0, 1.5, -2.2]))


def test_only_the_loss_has_a_gradient(lengths_mask):
    logprobs, old, advantages, mask = policy_case(lengths_mask)
    out = policy_loss(logprobs.requires_grad_(), old, advantages, mask, 0.2, 0.2, 14)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    values, old_values, returns, mask = value_case(lengths_mask)
    out = value_loss(values.requires_grad_(), old_values, returns, mask, 0.2, 14)
    assert [x.requires_grad for x in out] == [True, False]


def test_the_expected_ratio_is_1_under_a_shared_support():
    kept = torch.tensor([True, False, True, True, False])
    old, new = (torch.randn(5, dtype=torch.float64)[kept].log_softmax(0) for _ in range(2))
    # every kept token once, weighted by its old probability
    out = policy_loss(new, old, torch.zeros(3).double(), ALL[:3], 0.2, 0.2, 1, weights=old.exp())
    assert_close(out.ratio_mean.item(), 1.0, rtol=1e-12, atol=0)
    true_kl = sum(math.exp(a) * (a - b) for a, b in zip(old.tolist(), new.tolist(), strict=True))
    assert_close(out.approxkl.item(), true_kl)


def test_value_loss_by_hand():
    # cliprange .5, old value 1
    #   V 2, R 3: 1 against clip 1.5, error 2.25 -> 2.25 cut
    #   V 1, R 0: 1 and 1 -> 1          V 0, R 1: 1 against clip .5, error .25 -> 1
    # .5 * 4.25 = 2.125 over a denominator of 4
    values, old, returns = torch.tensor([2.0, 1.0, 0.0]), torch.ones(3), torch.tensor([3.0, 0.0, 1.0])
    out = value_loss(values, old, returns, ALL[:3], 0.5, denominator=4)
    assert_close(out.loss, torch.tensor(0.53125))
    assert_close(out.clipfrac, torch.tensor(0.25))
    # without a clip: .5 * (1 + 1 + 1) / 4
    out = value_loss(values, old, returns, ALL[:3], None, denominator=4)
    assert_close(out.loss, torch.tensor(0.375))
    assert out.clipfrac == 0


def test_value_loss_clips_downwards_too():
    # V -1 from old 1 is clipped to .5; R -2: 1 against 6.25
    out = value_loss(-torch.ones(1), torch.ones(1), torch.tensor([-2.0]), ALL[:1], 0.5, denominator=1)
    assert_close(out.loss, torch.tensor(3.125))


def test_value_loss_by_brute_force(lengths_mask):
    values, old, returns, mask = value_case(lengths_mask)
    out = value_loss(values, old, returns, mask, 0.3, denominator=14)
    loss, cut = 0.0, 0
    for b in range(4):
        for t in range(6):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                near = max(min(v, o + 0.3), o - 0.3)
                loss += 0.5 * max((v - r) ** 2, (near - r) ** 2)
                cut += (near - r) ** 2 > (v - r) ** 2 + 1e-9
    assert cut > 1
    assert abs(out.loss - loss / 14) < 1e-6
    assert abs(out.clipfrac - cut / 14) < 1e-6


def test_rounding_does_not_count_as_a_clip():
    # within the range nothing is clipped, though old + (V - old) differs from V in its last digit
    old = torch.randn(1000)
    values = torch.randn(1000)
    mask = torch.ones(1000, dtype=torch.bool)
    assert value_loss(values, old, torch.zeros(1000), mask, 10.0, 1000).clipfrac == 0


def losses(lengths_mask, dtype=torch.float32):
    """The two losses as functions of (their trained tensor, the rest); the rest carries rows."""
    logprobs, *policy_rest = policy_case(lengths_mask, dtype)
    values, *value_rest = value_case(lengths_mask, dtype)

    def policy(x, old, advantages, mask, weights):
        return policy_loss(x, old, advantages, mask, 0.2, 0.3, 14, weights, dual_clip=1.5)

    def value(x, old, returns, mask, weights):
        return value_loss(x, old, returns, mask, 0.3, 14, weights)

    weights = torch.rand(4, 6, dtype=dtype)
    return [(policy, logprobs, [*policy_rest, weights]), (value, values, [*value_rest, weights])]


@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck(which, lengths_mask):
    loss, x, rest = losses(lengths_mask, torch.float64)[which]
    assert torch.autograd.gradcheck(lambda t: loss(t, *rest).loss, x.requires_grad_())


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("fill", [NAN, math.inf, -math.inf, 1e30])
def test_contents_of_padding_change_neither_values_nor_gradients(which, fill, lengths_mask):
    loss, x, rest = losses(lengths_mask)[which]
    mask = rest[2]
    clean = x.clone().requires_grad_()
    expected = loss(clean, *rest)
    expected.loss.backward()
    spoiled = torch.where(mask, x, fill).requires_grad_()
    out = loss(spoiled, *(torch.where(mask, r, fill) if r is not mask else r for r in rest))
    out.loss.backward()
    assert_close(out, expected, rtol=0, atol=0)
    assert_close(spoiled.grad, clean.grad, rtol=0, atol=0)
    assert (spoiled.grad[~mask] == 0).all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 1], [2, 2]])
def test_micro_batches_add_up_to_the_large_batch(which, sizes, lengths_mask):
    loss, x, rest = losses(lengths_mask)[which]
    whole = x.clone().requires_grad_()
    expected = loss(whole, *rest)
    expected.loss.backward()
    accumulated, outs = x.clone().requires_grad_(), []
    for part in zip(accumulated.split(sizes), *(r.split(sizes) for r in rest), strict=True):
        outs.append(loss(*part))
        outs[-1].loss.backward()
    for field in expected._fields:
        parts = torch.stack([getattr(out, field).detach() for out in outs])
        combined = parts.max() if field == "ratio_max" else parts.sum()
        assert_close(combined, getattr(expected, field).detach())
    assert_close(accumulated.grad, whole.grad)


def test_sequence_weights_give_the_mean_of_sequence_means(lengths_mask):
    logprobs, old, advantages, mask = policy_case(lengths_mask)
    out = policy_loss(logprobs, old, advantages, mask, 0.2, 0.2, 4, weights=sequence_weights(mask))
    means = [
        policy_loss(logprobs[b], old[b], advantages[b], mask[b], 0.2, 0.2, int(mask[b].sum()))
        for b in range(4)
    ]
    for field in ("loss", "approxkl", "clipfrac", "ratio_mean"):
        assert_close(getattr(out, field), sum(getattr(m, field) for m in means) / 4)


def test_a_call_without_tokens_adds_nothing(lengths_mask):
    for loss, x, rest in losses(lengths_mask):
        for rows in (slice(0, 4), slice(0, 0)):
            part = [r[rows] for r in rest]
            part[2] = torch.zeros_like(part[2])
            assert all(field == 0 for field in loss(x[rows], *part))


def test_half_precision_is_computed_in_float32():
    logprobs, old = torch.tensor([-1.0]).bfloat16(), torch.tensor([-1.0078125]).bfloat16()
    out = policy_loss(logprobs, old, torch.ones(1).bfloat16(), ALL[:1], 0.2, 0.2, 1)
    assert_close(out.ratio_mean, torch.tensor(math.exp(0.0078125)))
    value = value_loss(logprobs, old, torch.zeros(1).bfloat16(), ALL[:1], None, 3)
    assert_close(value.loss, torch.tensor(0.5 / 3))
    # the bound of the dual clip, 1.2345 * 1, is not a bf16 number
    dual = policy_loss(
        torch.ones(1), torch.zeros(1), -torch.ones(1).bfloat16(), ALL[:1], 0.2, 0.2, 1, None, 1.2345
    )
    assert_close(dual.loss, torch.tensor(1.2345))
    # residuals 255.5 and 0, which bf16 would round to 256: 1 - (127.75 / 128)^2
    explained = explained_variance(
        torch.tensor([0.5, 0]).bfloat16(), torch.tensor([256.0, 0]).bfloat16(), ALL[:2]
    )
    assert_close(explained, torch.tensor(0.0039024), atol=1e-6, rtol=0)


def test_a_value_loss_of_half_precision_is_computed_in_float32():
    # .8984375^2 / 2 is no bf16 number
    x, zero = torch.tensor([0.8984375]).bfloat16(), torch.zeros(1).bfloat16()
    assert_close(value_loss(x, x, zero, ALL[:1], None, 1).loss, torch.tensor(0.8984375**2 / 2))


def test_float64_gives_float64(lengths_mask):
    for loss, x, rest in losses(lengths_mask, torch.float64):
        assert {field.dtype for field in loss(x, *rest)} == {torch.float64}
        # without weights too
        assert {field.dtype for field in loss(x, *rest[:3], None)} == {torch.float64}


@pytest.mark.parametrize("denominator", [0, -1])
def test_denominator_must_be_positive(denominator):
    x = torch.zeros(5)
    with pytest.raises(ValueError, match="denominator"):
        policy_loss(x, x, x, ALL, 0.2, 0.2, denominator)
    with pytest.raises(ValueError, match="denominator"):
        value_loss(x, x, x, ALL, 0.2, denominator)


def test_denominator_may_be_a_tensor():
    arguments = RATIOS.log(), torch.zeros(5), ADVANTAGES, ALL, 0.2, 0.2
    assert_close(policy_loss(*arguments, torch.tensor(10)), policy_loss(*arguments, 10))


def test_explained_variance_by_hand():
    # returns 1, 3 (variance 1), residuals 0, 1 (variance 1/4): 1 - 1/4
    values, returns = torch.tensor([1.0, 2.0, NAN]), torch.tensor([1.0, 3.0, NAN])
    mask = torch.tensor([True, True, False])
    assert_close(explained_variance(values, returns, mask), torch.tensor(0.75))
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((3,), 7.0), returns, mask) == 0
    # residuals -2, 2 (variance 4): 1 - 4
    assert explained_variance(torch.tensor([3.0, 1.0, 0.0]), returns, mask) == -3


def test_shapes_are_checked():
    x, wrong = torch.zeros(5), torch.zeros(4)
    with pytest.raises(ValueError, match="advantages has shape"):
        policy_loss(x, x, wrong, ALL, 0.2, 0.2, 1)
    with pytest.raises(ValueError, match="returns has shape"):
        value_loss(x, x, wrong, ALL, 0.2, 1)
    with pytest.raises(ValueError, match="mask has shape"):
        policy_loss(x, x, x, ALL, 0.2, 0.2, 1, weights=wrong)
    with pytest.raises(ValueError, match="returns has shape"):
        explained_variance(x, wrong, ALL)
