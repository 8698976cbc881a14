"""Log-probabilities of given tokens: the plain reference, and one that never holds all the logits.

Training needs log pi(token) at every response position. Through the logits this holds [N, V] numbers, forward
and backward: 64 answers of 512 tokens at V = 151k are 20 GB in float32. `linear_logprobs` works through
[chunk, V] at a time and keeps [N, d]. Left out: a gradient for the output layer, which is frozen here.

The repetition penalty is replayed position by position. It adds 2 gathers and scatters of L numbers a position
(L: the longest prompt + answer of the micro-batch), for which about 40 L bytes move, where the product alone takes
2 d V operations and the softmax moves some 20 V bytes: about 1 % at L = 512 and V = 49k. A penalty of 1 adds nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_exp.algorithms.logits import OutputLayer, rows_at_once
from rlhf_exp.algorithms.product import linear
from rlhf_exp.algorithms.repetition import Repetition, penalise, penalise_gradient
from rlhf_exp.algorithms.shapes import at_least_float32, check_shapes
from rlhf_exp.algorithms.support import Support


def _log_softmax(logits: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    _check_temperature(temperature)
    logits = at_least_float32(logits) / temperature
    if allowed is not None:
        check_shapes(logits=(logits, "... V"), allowed=(allowed, "... V"))
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.log_softmax(dim=-1)


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, allowed: Tensor | None = None
) -> Tensor:
    """log softmax(logits / temperature)[target], renormalised on `allowed`, in float32 or wider.

    logits [..., V], targets int[...], allowed bool[..., V] or None -> [...]. Give it real positions only
    (`logits[mask]`). Raises ValueError for a target outside the vocabulary or outside `allowed`.
    """
    check_shapes(logits=(logits, "... V"), targets=(targets, "..."))
    _check_vocabulary("target", targets, logits.shape[-1])
    logprobs = _log_softmax(logits, temperature, allowed)
    index = targets.long().unsqueeze(-1)
    if allowed is not None:
        _check_kept(allowed.gather(-1, index).squeeze(-1), targets)
    return logprobs.gather(-1, index).squeeze(-1)


def entropy(logits: Tensor, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
    """Entropy [...] in nats of softmax(logits [..., V] / temperature) renormalised on `allowed`."""
    logprobs = _log_softmax(logits, temperature, allowed)
    # 0 log 0 = 0: both factors are set, for the product alone would still send NaN through the gradient.
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(dim=-1)


class LinearLogprobs(NamedTuple):
    """Float32[N] each (float64 for float64 hidden states); `logprobs` carries a gradient, `entropy` on demand."""

    logprobs: Tensor  # of the targets, under the distribution that was sampled from
    entropy: Tensor | None  # of that distribution, in nats; None where it was not asked for
    kept_mass: Tensor  # what the unrestricted distribution at this temperature gives to the kept set


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    support: Support | None = None,
    suppressed: tuple[Tensor, Sequence[int] | Tensor] | None = None,
    chunk_size: int | None = None,
    repetition: Repetition | None = None,
    entropy_gradient: bool = False,
    entropy: bool = True,
    layer: OutputLayer | None = None,
) -> LinearLogprobs:
    """log softmax((hidden @ weight.T + bias) / temperature)[target], renormalised on the kept tokens.

    hidden [N, d] of real positions only, weight [V, d], bias [V] or None, targets int[N]; `support` of
    the N positions, or None for all tokens; `suppressed` (bool[N], token ids[S]) forbids these ids where it is
    True, (bool[N, S], ids) each where its own column is; `repetition` penalises the logits before the
    temperature, with the tokens before each position. Logits (logits.py) and softmax are in float32 or wider, the
    gradient in the dtype of `hidden`. `chunk_size` positions are worked on at once, by default `rows_at_once`.
    `layer`: the output layer of this weight and bias, where it was made before (Base.output).

    The output layer is frozen and each log-prob receives one number from above, so its gradient d logp / d
    hidden = ((onehot - p) * d logits' / d logits) @ weight / temperature is complete in the forward: it is
    computed there, only when asked for, and scaled in the backward. Nothing is recomputed and no [N, V] is kept.
    With `entropy_gradient` the entropy's is too: d H / d logits' = -p (log p + H).

    The softmax is taken once, in place: e = exp(logits - max), of which sums, log-probs and the gradient are made.
    The division by the sum is left to [N, d]. `entropy=False` saves a copy of the logits and two passes over it.

    Raises ValueError for a target outside the vocabulary or its kept set, naming the position (a silent -inf
    would become a NaN loss), and for an output layer that wants a gradient (`token_logprobs` gives one).
    """
    check_shapes(hidden=(hidden, "N d"), weight=(weight, "V d"), targets=(targets, "N"))
    _check_temperature(temperature)
    _check_vocabulary("target", targets, weight.shape[0])
    targets = targets.long()
    if bias is not None:
        check_shapes(weight=(weight, "V d"), bias=(bias, "V"))
    if support is not None:
        check_shapes(hidden=(hidden, "N d"), **{"support.counts": (support.counts, "N")})
    if suppressed is not None:
        ids = torch.as_tensor(suppressed[1], dtype=torch.int64, device=hidden.device)
        where = suppressed[0]
        check_shapes(
            hidden=(hidden, "N d"), mask=(where, "N S" if where.ndim == 2 else "N"), token_ids=(ids, "S")
        )
        _check_vocabulary("suppressed token", ids, weight.shape[0])
        suppressed = (where if where.ndim == 2 else where.unsqueeze(1), ids)
    if repetition is not None:
        repetition.check(len(hidden), weight.shape[0])
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "linear_logprobs gives no gradient to the output layer: freeze it, or use token_logprobs"
        )
    if chunk_size is None:
        chunk_size = rows_at_once(weight)
    if layer is None:
        layer = OutputLayer(weight, bias, hidden.dtype)
    elif not layer.is_of(weight, hidden.dtype):
        raise ValueError("layer was made of another weight, or for another dtype")
    # Inside a Function's forward gradients are always off, so this can only be asked here.
    with_gradient = hidden.requires_grad and torch.is_grad_enabled()
    weight = weight.to(hidden.dtype)
    return LinearLogprobs(
        *_LinearLogprobs.apply(
            hidden,
            weight,
            layer,
            targets,
            temperature,
            support,
            suppressed,
            repetition,
            chunk_size,
            with_gradient,
            with_gradient and entropy_gradient,
            entropy or entropy_gradient,
        )
    )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        layer,
        targets,
        temperature,
        support,
        suppressed,
        repetition,
        chunk_size,
        with_gradient,
        entropy_gradient,
        with_entropy,
    ):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, kept_mass = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(2))
        entropies = torch.empty_like(logprobs) if with_entropy else None
        kept = torch.ones_like(targets, dtype=torch.bool)
        gradient = torch.empty_like(hidden) if with_gradient else None
        of_entropy = torch.empty_like(hidden) if entropy_gradient else None
        supports = support.split(chunk_size) if support is not None else None
        for i, start in enumerate(range(0, len(hidden), chunk_size)):
            rows = slice(start, start + chunk_size)
            target = targets[rows].unsqueeze(1)
            logits = layer(hidden[rows])
            if repetition is not None:
                seen = repetition.seen(rows)
                factors = penalise(logits, seen, repetition.penalty)
            if temperature != 1:
                logits.div_(temperature)
            before = _changed(logits, supports is not None, suppressed, rows)
            _restrict(logits, supports[i] if supports is not None else None, suppressed, rows)
            own = logits.gather(1, target)
            kept[rows] = (own != -torch.inf).squeeze(1)
            # a softmax without its division: exp(logits - max) and its sums
            most = logits.amax(dim=1, keepdim=True)
            shifted = logits.sub_(most)
            exps = shifted.exp_() if entropies is None else shifted.exp()
            sums = exps.sum(dim=1, keepdim=True)
            logprobs[rows] = (own - most - sums.log()).squeeze(1)
            kept_mass[rows] = _kept_mass((most + sums.log()).squeeze(1), before)
            if entropies is not None:
                # H = log S - sum e x / S with e = exp(x), S their sum; what is forbidden has e = 0
                shifted.clamp_(min=torch.finfo(shifted.dtype).min)
                entropies[rows] = (
                    sums.log() - torch.linalg.vecdot(exps, shifted).unsqueeze(1) / sums
                ).squeeze(1)
                if of_entropy is not None:
                    slope = shifted.add_(entropies[rows].unsqueeze(1) - sums.log()).mul_(exps).div_(-sums)
                    if repetition is not None:
                        penalise_gradient(slope, seen, factors)
                    of_entropy[rows] = linear(slope.to(hidden.dtype), weight.T) / temperature
            if gradient is not None:
                # (p - onehot) * sums: where p is near 1, onehot - p must not be a difference of rounded products
                residual = exps.scatter_add_(1, target, -sums)
                if repetition is not None:
                    penalise_gradient(residual, seen, factors)
                gradient[rows] = linear(residual.to(hidden.dtype), weight.T) / (-temperature * sums)
        _check_kept(kept, targets)
        if gradient is not None:
            ctx.save_for_backward(gradient, of_entropy)
        constant = [kept_mass] if entropy_gradient or entropies is None else [entropies, kept_mass]
        ctx.mark_non_differentiable(*constant)
        return logprobs, entropies, kept_mass

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, _grad_kept_mass):
        gradient, of_entropy = ctx.saved_tensors
        total = grad_logprobs.unsqueeze(1) * gradient
        if of_entropy is not None:
            total = total + grad_entropy.unsqueeze(1) * of_entropy
        return total, *[None] * 11


def _restrict(
    logits: Tensor, support: Support | None, suppressed: tuple[Tensor, Tensor] | None, rows: slice
) -> None:
    """Set the logits [chunk, V] of tokens that are not kept to -inf."""
    if support is not None:
        logits.masked_fill_(~support.to_mask(logits.shape[1]), -torch.inf)
    if suppressed is not None:
        where, ids = suppressed
        logits[:, ids] = logits[:, ids].masked_fill(where[rows], -torch.inf)


def _changed(
    logits: Tensor, supported: bool, suppressed: tuple[Tensor, Tensor] | None, rows: slice
) -> tuple[Tensor, Tensor] | None:
    """Rows that `_restrict` will change, bool[chunk], and log sum exp of their logits before; None: no row."""
    if supported:
        where = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return where, logits.logsumexp(dim=1)
    if suppressed is None:
        return None
    where = suppressed[0][rows].any(dim=1)
    return where, logits[where].logsumexp(dim=1)


def _kept_mass(normaliser: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
    """What the kept tokens have of the unrestricted distribution [chunk], from log sum exp of what is kept."""
    if before is None:
        return torch.ones_like(normaliser)
    where, total = before
    return torch.ones_like(normaliser).masked_scatter(where, (normaliser[where] - total).exp())


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_vocabulary(what: str, ids: Tensor, vocab_size: int) -> None:
    # On a GPU an index out of range ends the process; -100 from a label tensor is the usual one.
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        position = outside.nonzero()[0].tolist()
        token = ids[tuple(position)].item()
        raise ValueError(f"{what} {token} at position {position} is outside the vocabulary of {vocab_size}")


def _check_kept(kept: Tensor, targets: Tensor) -> None:
    if not kept.all():
        position = (~kept).nonzero()[0].tolist()
        token = targets[tuple(position)].item()
        raise ValueError(
            f"target {token} at position {position} is outside its support"
            f" ({(~kept).sum().item()} such targets): was the support recorded from the policy that sampled?"
        )
