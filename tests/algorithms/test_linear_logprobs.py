"""`linear_logprobs` against the plain reference, its memory, and its errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_exp.algorithms import logits as products
from rlhf_exp.algorithms import logprob
from rlhf_exp.algorithms.logprob import entropy, linear_logprobs, token_logprobs
from rlhf_exp.algorithms.support import Support

N, D, V = 13, 8, 29


def problem(dtype=torch.float32, with_bias=True, restricted=True, seed=0):
    """hidden, weight, bias, targets, allowed: every target is allowed."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    bias = torch.randn(V, dtype=dtype) if with_bias else None
    targets = torch.randint(V, (N,))
    allowed = None
    if restricted:
        allowed = (torch.rand(N, V) < 0.3).scatter(1, targets.unsqueeze(1), True)
    return hidden, weight, bias, targets, allowed


def reference(hidden, weight, bias, targets, temperature, allowed):
    """The same three numbers through all the logits."""
    logits = F.linear(hidden, weight, bias)
    probs = (logits.double() / temperature).softmax(-1)
    mass = probs.sum(-1) if allowed is None else (probs * allowed).sum(-1)
    return (
        token_logprobs(logits, targets, temperature, allowed),
        entropy(logits, temperature, allowed),
        mass.to(logits.dtype),
    )


def test_by_hand():
    # hidden (1, 0): logits 0, log 2, log 5, plus bias 0, 0, log 1 -> probabilities 1/8, 2/8, 5/8
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [math.log(2), 2.0], [math.log(5), 4.0]])
    support = Support(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2]))
    out = linear_logprobs(hidden, weight, None, torch.tensor([1]), support=support)
    assert_close(out.logprobs.detach().exp(), torch.tensor([2 / 3]))  # (2/8) / (1/8 + 2/8)
    assert_close(out.kept_mass, torch.tensor([3 / 8]))
    assert_close(out.entropy, torch.tensor([math.log(3) - 2 / 3 * math.log(2)]))
    out.logprobs.sum().backward()
    # (onehot - p) @ weight with p = 1/3, 2/3, 0: second column -1/3 * 1 + (1 - 2/3) * 2 = 1/3
    assert_close(hidden.grad, torch.tensor([[math.log(2) / 3, 1 / 3]]))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0, 2.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("restricted", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, 13, None])
def test_equals_the_reference(temperature, with_bias, restricted, chunk_size):
    hidden, weight, bias, targets, allowed = problem(with_bias=with_bias, restricted=restricted)
    support = Support.from_mask(allowed) if restricted else None
    upstream = torch.randn(N)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = linear_logprobs(ours, weight, bias, targets, temperature, support, chunk_size=chunk_size)
    expected = reference(theirs, weight, bias, targets, temperature, allowed)
    for name, a, b in zip(out._fields, out, expected, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    (out.logprobs * upstream).sum().backward()
    (expected[0] * upstream).sum().backward()
    assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("restricted", [True, False])
def test_gradcheck(restricted):
    hidden, weight, bias, targets, allowed = problem(torch.float64, restricted=restricted)
    support = Support.from_mask(allowed) if restricted else None
    suppressed = (torch.arange(N) < 3, [(targets[:3].max().item() + 1) % V]) if not restricted else None
    assert torch.autograd.gradcheck(
        lambda h: linear_logprobs(h, weight, bias, targets, 0.8, support, suppressed, chunk_size=4).logprobs,
        hidden.requires_grad_(),
    )


def test_chunk_size_changes_nothing():
    hidden, weight, bias, targets, allowed = problem(torch.float64)
    support = Support.from_mask(allowed)
    whole = linear_logprobs(hidden, weight, bias, targets, support=support, chunk_size=N)
    for size in (1, 2, 3, 12, 100):
        assert_close(linear_logprobs(hidden, weight, bias, targets, support=support, chunk_size=size), whole)


def test_suppressed_equals_a_support_without_these_tokens():
    hidden, weight, bias, targets, allowed = problem()
    positions, ids = torch.arange(N) % 3 == 0, [4, 17]
    targets = torch.where(torch.isin(targets, torch.tensor(ids)), 0, targets)
    allowed.scatter_(1, targets.unsqueeze(1), True)
    for base in (torch.ones(N, V, dtype=torch.bool), allowed):
        without = base.clone()
        for n in range(N):
            for token in ids:
                without[n, token] &= not positions[n]
        support = None if base.all() else Support.from_mask(base)
        got = linear_logprobs(hidden, weight, bias, targets, 0.9, support, (positions, ids), chunk_size=5)
        expected = linear_logprobs(
            hidden, weight, bias, targets, 0.9, Support.from_mask(without), chunk_size=5
        )
        assert_close(got, expected)
        assert (got.kept_mass[positions] < 1).all()  # what is suppressed counts as removed
        as_tensor = (positions, torch.tensor(ids))
        assert_close(linear_logprobs(hidden, weight, bias, targets, 0.9, support, as_tensor), expected)


def test_each_suppressed_token_can_have_its_own_positions():
    hidden, weight, bias, targets, _ = problem(restricted=False)
    ids, where = [4, 17], torch.stack([torch.arange(N) < 5, torch.arange(N) % 2 == 0], dim=1)
    targets = torch.where(torch.isin(targets, torch.tensor(ids)), 0, targets)
    allowed = torch.ones(N, V, dtype=torch.bool)
    allowed[:5, 4] = False
    allowed[::2, 17] = False
    got = linear_logprobs(hidden, weight, bias, targets, 0.9, None, (where, ids), chunk_size=4)
    expected = linear_logprobs(hidden, weight, bias, targets, 0.9, Support.from_mask(allowed))
    assert_close(got, expected)
    with pytest.raises(ValueError, match="token_ids has shape"):
        linear_logprobs(hidden, weight, bias, targets, suppressed=(where, [4]))


def test_suppressed_targets_elsewhere_are_fine():
    hidden, weight, bias, _, _ = problem()
    targets = torch.full((N,), 4)
    positions = torch.arange(N) == 5
    targets[5] = 3
    out = linear_logprobs(hidden, weight, bias, targets, suppressed=(positions, [4]), chunk_size=4)
    assert_close(out.kept_mass[~positions], torch.ones(N - 1))
    targets[5] = 4
    with pytest.raises(ValueError, match=r"target 4 at position \[5\] is outside its support \(1 such"):
        linear_logprobs(hidden, weight, bias, targets, suppressed=(positions, [4]), chunk_size=4)


def test_without_restriction_the_kept_mass_is_exactly_1():
    hidden, weight, bias, targets, _ = problem()
    assert (linear_logprobs(hidden, weight, bias, targets).kept_mass == 1).all()


def test_bfloat16_hidden_with_a_float32_softmax():
    hidden, weight, bias, targets, allowed = problem(torch.bfloat16)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = linear_logprobs(ours, weight, bias, targets, 0.7, Support.from_mask(allowed), chunk_size=5)
    assert all(x.dtype == torch.float32 for x in out)
    exact = F.linear(theirs.float(), weight.float(), bias.float())  # not rounded to bf16 by the product
    expected = token_logprobs(exact, targets, 0.7, allowed)
    assert_close(out.logprobs, expected, atol=1e-5, rtol=1e-5)
    assert_close(out.entropy, entropy(exact, 0.7, allowed), atol=1e-5, rtol=1e-5)
    out.logprobs.sum().backward()
    expected.sum().backward()
    assert ours.grad.dtype == torch.bfloat16
    assert_close(ours.grad, theirs.grad, atol=0.05, rtol=0.02)


def test_a_layer_of_another_dtype_follows_hidden():
    hidden, weight, bias, targets, _ = problem(torch.float64)
    out = linear_logprobs(hidden, weight.bfloat16(), bias.bfloat16(), targets)
    expected = linear_logprobs(hidden, weight.bfloat16().double(), bias.bfloat16().double(), targets)
    assert out.logprobs.dtype == torch.float64
    assert_close(out, expected)


def test_large_logits_stay_finite():
    hidden, weight, bias, targets, allowed = problem()
    hidden = (1e4 * hidden).requires_grad_()
    out = linear_logprobs(hidden, weight, bias, targets, support=Support.from_mask(allowed))
    out.logprobs.sum().backward()
    assert all(x.isfinite().all() for x in (*out, hidden.grad))


def test_a_bad_position_spoils_no_other():
    hidden, weight, bias, targets, _ = problem()
    good = linear_logprobs(hidden, weight, bias, targets)
    hidden[6] = math.nan
    others = torch.arange(N) != 6
    out = linear_logprobs(hidden.requires_grad_(), weight, bias, targets)
    assert out.logprobs[6].isnan()
    assert_close(out.logprobs[others], good.logprobs[others])
    out.logprobs[others].sum().backward()
    assert hidden.grad[others].isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("restricted", [True, False])
def test_never_holds_more_than_a_chunk_of_logits_and_keeps_one_vector_a_position(restricted):
    hidden, weight, bias, targets, allowed = problem(restricted=restricted)
    support = Support.from_mask(allowed) if restricted else None
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x),
        LargestTensor() as largest,
    ):
        suppressed = (torch.zeros(N, dtype=torch.bool), [0])
        arguments = (hidden.requires_grad_(), weight, bias, targets, 1.0, support, suppressed)
        linear_logprobs(*arguments, chunk_size=2).logprobs.sum().backward()
    assert kept == [(N, D)]
    # 2 positions of 29 logits are 58; the weight and [N, d] have 232 and 104, all logits would be 377
    assert largest.numel <= V * D


def test_default_chunk_stays_within_the_budget(monkeypatch):
    hidden, weight, bias, targets, _ = problem()
    sizes = []

    class Spy(products.OutputLayer):
        def __call__(self, x):
            sizes.append(len(x))
            return super().__call__(x)

    monkeypatch.setattr(logprob, "OutputLayer", Spy)
    monkeypatch.setattr(products, "LOGIT_BUDGET", 4 * V + 1)
    linear_logprobs(hidden, weight, bias, targets)
    assert sizes == [4, 4, 4, 1]
    monkeypatch.setattr(products, "LOGIT_BUDGET", 1)  # a vocabulary larger than the budget
    sizes.clear()
    linear_logprobs(hidden, weight, bias, targets)
    assert sizes == [1] * N


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.mkldnn._linear_pointwise)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_gradient_work_only_when_asked_for(how):
    hidden, weight, bias, targets, _ = problem()
    products = []

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in PRODUCTS:
                products.append(func)
            return func(*args, **(kwargs or {}))

    with CountProducts(), torch.set_grad_enabled(how != "no_grad"):
        out = linear_logprobs(hidden.requires_grad_(how == "no_grad"), weight, bias, targets)
    assert len(products) == 1
    assert not out.logprobs.requires_grad


def test_metrics_are_detached():
    hidden, weight, bias, targets, _ = problem()
    out = linear_logprobs(hidden.requires_grad_(), weight, bias, targets)
    assert out.logprobs.requires_grad
    assert not out.entropy.requires_grad
    assert not out.kept_mass.requires_grad


@pytest.mark.parametrize("restricted", [True, False])
def test_no_positions(restricted):
    hidden, weight, bias, targets, allowed = problem(restricted=restricted)
    support = Support.from_mask(allowed[:0]) if restricted else None
    none = hidden[:0].requires_grad_()
    out = linear_logprobs(none, weight, bias, targets[:0], support=support)
    assert [len(x) for x in out] == [0, 0, 0]
    out.logprobs.sum().backward()
    assert none.grad.shape == (0, D)


def test_target_outside_its_support_is_named():
    hidden, weight, bias, targets, allowed = problem()
    allowed[7, targets[7]] = False
    allowed[9] = False
    with pytest.raises(ValueError, match=rf"target {targets[7]} at position \[7\] .* \(2 such targets\)"):
        linear_logprobs(hidden, weight, bias, targets, support=Support.from_mask(allowed), chunk_size=4)


@pytest.mark.parametrize("target", [-100, V])
def test_target_outside_the_vocabulary(target):
    hidden, weight, bias, targets, _ = problem()
    targets[2] = target
    with pytest.raises(ValueError, match=rf"target {target} at position \[2\] is outside the vocabulary"):
        linear_logprobs(hidden, weight, bias, targets)


@pytest.mark.parametrize("token", [-1, V])
def test_suppressed_token_outside_the_vocabulary(token):
    hidden, weight, bias, targets, _ = problem()
    with pytest.raises(ValueError, match=rf"suppressed token {token} at position \[1\] is outside the voc"):
        linear_logprobs(hidden, weight, bias, targets, suppressed=(targets < 3, [0, token]))


def test_int32_targets():
    hidden, weight, bias, targets, _ = problem()
    arguments = hidden, weight, bias
    assert_close(linear_logprobs(*arguments, targets.int()), linear_logprobs(*arguments, targets))
    gradients = []
    for ids in (targets.int(), targets):
        leaf = hidden.clone().requires_grad_()
        linear_logprobs(leaf, weight, bias, ids).logprobs.sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_an_output_layer_that_is_trained_is_refused(which):
    hidden, weight, bias, targets, _ = problem()
    {"weight": weight, "bias": bias}[which].requires_grad_()
    with pytest.raises(ValueError, match="no gradient to the output layer"):
        linear_logprobs(hidden, weight, bias, targets)
    with torch.no_grad():
        linear_logprobs(hidden, weight, bias, targets)


def test_shapes_and_temperature_are_checked():
    hidden, weight, bias, targets, allowed = problem()
    support = Support.from_mask(allowed)
    with pytest.raises(ValueError, match="weight has shape"):
        linear_logprobs(hidden, weight[:, 1:], bias, targets)
    with pytest.raises(ValueError, match="bias has shape"):
        linear_logprobs(hidden, weight, bias[1:], targets)
    with pytest.raises(ValueError, match="targets has shape"):
        linear_logprobs(hidden, weight, bias, targets[1:])
    with pytest.raises(ValueError, match=r"support\.counts has shape"):
        linear_logprobs(hidden, weight, bias, targets, support=support.rows(torch.arange(N - 1)))
    with pytest.raises(ValueError, match="mask has shape"):
        linear_logprobs(hidden, weight, bias, targets, suppressed=(torch.ones(2, dtype=torch.bool), [0]))
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(hidden, weight, bias, targets, temperature=0)


def test_the_budget_is_16_megabytes():
    assert products.LOGIT_BUDGET * torch.float32.itemsize == 16 * 2**20


def test_the_hidden_states_are_left_as_they_are():
    hidden, weight, bias, targets, _ = problem()
    before = hidden.clone()
    hidden.requires_grad_()
    for entropy_gradient in (False, True):
        linear_logprobs(
            hidden, weight, bias, targets, chunk_size=4, entropy_gradient=entropy_gradient
        ).logprobs.sum().backward()
        assert torch.equal(hidden.detach(), before)


def test_no_second_derivative_is_given_instead_of_a_wrong_one():
    hidden, weight, bias, targets, _ = problem()
    out = linear_logprobs(hidden.requires_grad_(), weight, bias, targets)
    (gradient,) = torch.autograd.grad(out.logprobs.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_suppressing_no_token_changes_nothing():
    hidden, weight, bias, targets, _ = problem()
    got = linear_logprobs(hidden, weight, bias, targets, suppressed=(torch.ones(N, dtype=torch.bool), []))
    assert_close(got, linear_logprobs(hidden, weight, bias, targets))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_without_the_entropy_nothing_else_changes(with_gradient):
    hidden, weight, bias, targets, allowed = problem()
    hidden.requires_grad_(with_gradient)
    support = Support.from_mask(allowed)
    logprobs, mass = reference(hidden, weight, bias, targets, 0.7, allowed)[::2]
    found = linear_logprobs(hidden, weight, bias, targets, 0.7, support, entropy=False)
    assert found.entropy is None
    assert_close(found.logprobs, logprobs)
    assert_close(found.kept_mass, mass)
    if with_gradient:
        (wanted,) = torch.autograd.grad(logprobs.sum(), hidden)
        (gradient,) = torch.autograd.grad(found.logprobs.sum(), hidden)
        assert_close(gradient, wanted)


def test_a_weight_in_bfloat16_under_float32_states():
    hidden, weight, bias, targets, _ = problem(restricted=False)
    weight = weight.bfloat16()
    hidden.requires_grad_()
    found = linear_logprobs(hidden, weight, bias, targets).logprobs
    logprobs = token_logprobs(F.linear(hidden, weight.float(), bias), targets)
    assert_close(found, logprobs)
    (wanted,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert_close(torch.autograd.grad(found.sum(), hidden)[0], wanted)
