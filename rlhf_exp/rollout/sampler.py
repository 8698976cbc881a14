"""From logits to a token: which tokens may be drawn, and the draw. Nothing here waits for the device.

Order as in transformers' generate (5.23, `_get_logits_processor`): repetition penalty, forbidden tokens,
temperature, top-k, top-p, min-p. The last three keep the most probable tokens up to some rank, so a kept set is
the front of the list of candidates, which are sorted by probability.

Costs for V = 49k, 32 rows, one thread: candidates 20 ms where a sort of all logits takes 100 to 150. top-k sorts k
candidates; top-p and min-p alone sort FIRST of them, and more only if some row's set is larger (`Kept.short`): the
flatter the distribution and the nearer top_p to 1, the nearer to a sort of the whole vocabulary at every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.repetition import penalise
from rlhf_exp.schema import Generation

FIRST = 1024  # candidates that top-p and min-p look at first
MORE = 16  # times as many where these are too few


def restricts(generation: Generation) -> bool:
    """Whether some tokens' probability is set to 0 by rank: top-k, top-p or min-p is on."""
    return not generation.greedy and (generation.top_k > 0 or generation.top_p < 1 or generation.min_p > 0)


def reshapes(generation: Generation) -> bool:
    """Whether answers come from another distribution than the model's own at temperature 1.

    Forbidden tokens do not count.
    """
    return restricts(generation) or generation.temperature != 1 or generation.repetition_penalty != 1


def records(generation: Generation) -> bool:
    """Whether log-probs need the kept sets of the rollout."""
    return restricts(generation) and generation.logprob_mode == "sampled"


def processed(
    logits: Tensor,
    generation: Generation,
    position: int,
    limits: Mapping[int, int],
    seen: Tensor | None = None,
) -> Tensor:
    """New logits [B, V] in float32, penalised and over the temperature; -inf for tokens forbidden at `position`.

    limits: of `texts.forbidden`. seen: int64[B, L], the tokens of prompt and answer so far, with a repetition
    penalty.
    """
    logits = logits.to(torch.float32, copy=True)
    if seen is not None:
        penalise(logits, seen, generation.repetition_penalty)
    for token, limit in limits.items():
        if position < limit:
            logits[:, token] = -torch.inf
    return logits.div_(generation.temperature)


class Kept(NamedTuple):
    """The K most probable tokens of B rows, most probable first, and how many of them top-k, top-p, min-p keep."""

    ids: Tensor  # int64[B, K]; of equal logits the lower id comes first
    logits: Tensor  # float32[B, K], -inf where not kept
    counts: Tensor  # int64[B], at least 1
    short: Tensor  # bool[B]: more than K tokens may be kept, so K was too small


def kept(logits: Tensor, generation: Generation, most: int = FIRST) -> Kept:
    """What top-k, then top-p, then min-p keep of `logits` float32[B, V], among `most` candidates if top-k is off.

    top-k (Fan et al. 2018): the k most probable. top-p (Holtzman et al. 2020, eq. 2): the smallest set of most
    probable tokens with mass >= p, under the distribution that top-k left. min-p (Nguyen et al. 2024, eq. 1-2):
    those with at least min_p times the largest probability.
    """
    size = min(generation.top_k or most, logits.shape[1])
    ids = _ranked(logits, size)
    best = logits.gather(1, ids)
    keep = best > -torch.inf
    if generation.top_k or size == logits.shape[1]:
        probs = best.softmax(dim=1)
    else:
        # not exp(best - logsumexp), whose rounding would be ten times as large
        probs = (best - best[:, :1]).exp() / (logits - best[:, :1]).exp().sum(dim=1, keepdim=True)
    if generation.top_p < 1:
        # the mass before a token: it is kept while that is still short of p
        keep &= probs.double().cumsum(dim=1) - probs < generation.top_p
    if generation.min_p > 0:
        keep &= probs >= generation.min_p * probs[:, :1]
    keep[:, 0] = True
    counts = keep.sum(dim=1)
    # sums of tiny numbers round: whatever happens at the edge, the kept set is the front
    keep = torch.arange(size, device=keep.device) < counts[:, None]
    short = counts == (0 if generation.top_k or size == logits.shape[1] else size)
    return Kept(ids, best.masked_fill(~keep, -torch.inf), counts, short)


def _ranked(logits: Tensor, size: int) -> Tensor:
    """int64[B, size]: the ids of the largest logits in order; of equal ones the lower ids, on every device.

    torch.topk takes any of equal values, and in bfloat16 many are equal. So the id is made a part of the value: a
    float's bits, read as an integer, are in the order of the floats (negative ones once their bits are flipped).
    """
    if size == logits.shape[1]:
        return logits.argsort(dim=1, descending=True, stable=True)
    bits = (logits + 0.0).view(torch.int32)  # + 0: -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    token = torch.arange(logits.shape[1], device=logits.device)
    values = (bits.long() << 32).add_(0xFFFFFFFF - token)
    return 0xFFFFFFFF - (values.topk(size, dim=1).values & 0xFFFFFFFF)


class Drawn(NamedTuple):
    """A token for each of B rows."""

    tokens: Tensor  # int64[B]
    logprobs: Tensor  # float32[B], see `sample`
    sound: Tensor  # bool[B], False where the logits are no distribution: nan, +inf, or everything forbidden
    kept: Kept | None  # with top-k, top-p or min-p
    mass: Tensor | None  # float32[B], in mode `raw`: of the tokens that could be drawn, among all


def sample(
    logits: Tensor,
    u: Tensor,
    generation: Generation,
    position: int,
    limits: Mapping[int, int],
    seen: Tensor | None = None,
    most: int = FIRST,
) -> Drawn:
    """Draw at `u` float64[B] from raw `logits` [B, V] through all processors (greedy: the most probable token).

    logprobs are of the distribution drawn from, in mode `raw` of softmax(logits); greedy: of that whose most
    probable token was taken. See `processed` and `kept` for the rest.
    """
    scores = processed(logits, generation, position, limits, seen)
    largest = scores.amax(dim=1) if restricts(generation) else None  # nan, if there is one
    found = kept(scores, generation, most) if restricts(generation) else None
    mass = None
    if generation.logprob_mode == "raw":
        everything = processed(logits, generation, position, {}, seen)
        drawn_from = scores if found is None else found.logits
        mass = (drawn_from.logsumexp(dim=1) - everything.logsumexp(dim=1)).exp()
    ids = None  # of the columns of `scores`; None: the whole vocabulary
    if found is not None and found.ids.shape[1] * 4 < scores.shape[1]:
        ids, order = found.ids.sort(dim=1)  # in the order of the vocabulary, as without a restriction
        scores = found.logits.gather(1, order)
    elif found is not None:
        scores = torch.full_like(scores, -torch.inf).scatter_(1, found.ids, found.logits)
    place = scores.argmax(dim=1) if generation.greedy else draw(scores, u)
    tokens = place if ids is None else ids.gather(1, place[:, None]).squeeze(1)
    if generation.logprob_mode == "raw":
        scores, place = logits.float(), tokens
    normaliser = scores.logsumexp(dim=1)
    logprobs = scores.gather(1, place[:, None]).squeeze(1) - normaliser
    return Drawn(tokens, logprobs, torch.isfinite(normaliser if largest is None else largest), found, mass)


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Token ids int64[B] by inverting the distribution function of softmax(logits [B, V]) at `u` float64[B].

    A token with logit -inf is never drawn. Where the logits are no distribution the id means nothing.
    """
    cumulative = logits.softmax(dim=-1).to(torch.float64).cumsum(dim=-1)
    # the first token whose cumulative mass exceeds u: `right` steps over tokens of mass 0
    place = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return place.clamp_(max=logits.shape[1] - 1)
