"""A vocabulary of five tokens, where every expectation is a finite sum.

Policy p samples with processors; another policy q is evaluated on p's recorded kept sets with the same processors.
Then E_p[q/p] = 1, and the means of k1 and k3 are the KL of the two renormalised distributions. The oracle is Python.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_exp.algorithms.kl import kl_divergence_estimate
from rlhf_exp.algorithms.logits import OutputLayer
from rlhf_exp.algorithms.support import Support
from rlhf_exp.rollout.sampler import kept, processed, records, restricts
from rlhf_exp.rollout.scoring import Answers, answer_logprobs
from rlhf_exp.rollout.texts import forbidden
from rlhf_exp.schema import Generation

V, EOS = 5, 4
P = [1.2, -0.4, 0.3, 0.9, 0.6]
Q = [-0.5, 0.8, 1.1, 0.2, -0.9]
HISTORY = [2, 0, 2]  # a prompt, at position 0; with one answer token more at position 1
WEIGHT = torch.eye(V, dtype=torch.float64)
LAYER = OutputLayer(WEIGHT, None, WEIGHT.dtype)
BASE = SimpleNamespace(
    output_layer=(WEIGHT, None),
    output=lambda dtype: LAYER,
    tokenizer=SimpleNamespace(convert_tokens_to_ids={"c": 2}.get, unk_token_id=None, unk_token=None),
    eos_id=EOS,
)
CHOICES = {
    "temperature": (1.0, 0.7),
    "top_k": (0, 3),
    "top_p": (1.0, 0.75),
    "min_p": (0.0, 0.45),
    "repetition_penalty": (1.0, 1.8),
    "begin_suppress_tokens": ([], ["eos"], ["c"]),
    "min_new_tokens": (0, 1),
}
SETTINGS = [
    Generation(**dict(zip(CHOICES, values, strict=True))) for values in itertools.product(*CHOICES.values())
]


def by_hand(logits, generation, position, history, only=None):
    """Probabilities of the five tokens, in Python; `only`: renormalised on these, else what the filters keep."""
    scores = list(logits)
    for token in set(history):
        factor = generation.repetition_penalty
        scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    banned = {EOS} if position < generation.min_new_tokens else set()
    if position == 0:
        banned |= {{"eos": EOS, "c": 2}[text] for text in generation.begin_suppress_tokens}
    weights = [0.0 if t in banned else math.exp(s / generation.temperature) for t, s in enumerate(scores)]
    if only is None:
        order = sorted((t for t in range(V) if weights[t]), key=lambda t: -weights[t])
        order = order[: generation.top_k or V]
        total, mass, only = sum(weights[t] for t in order), 0.0, []
        for token in order:
            if mass < generation.top_p and weights[token] >= generation.min_p * weights[order[0]]:
                only.append(token)
            mass += weights[token] / total
    total = sum(weights[t] for t in only)
    return {t: weights[t] / total for t in only}, total / sum(map(math.exp, _tempered(scores, generation)))


def _tempered(scores, generation):
    return [score / generation.temperature for score in scores]


def sampled_from(logits, generation, position, history):
    """The sampler's own distribution and kept set."""
    seen = torch.tensor([history]) if generation.repetition_penalty != 1 else None
    limits = forbidden(generation, BASE.tokenizer, EOS)
    scores = processed(torch.tensor([logits]), generation, position, limits, seen)
    if restricts(generation):
        found = kept(scores, generation)
        scores = torch.full_like(scores, -torch.inf).scatter(1, found.ids, found.logits)
    probs = scores[0].softmax(0)
    return {t: float(probs[t]) for t in range(V) if probs[t] > 0}


def scored(logits, generation, position, history, tokens, support):
    """`answer_logprobs` of every token of the kept set, as if each were the answer's next token."""
    n = len(tokens)
    ids = torch.tensor([[*history, token] for token in tokens])
    batch = Answers(
        rows=torch.arange(n),
        ids=ids,
        mask=torch.ones(n, 1, dtype=torch.bool),
        before=(torch.arange(n), torch.full((n,), len(history) - 1)),
        targets=torch.tensor(tokens),
        first=torch.full((n,), position),
        support=support,
    )
    return answer_logprobs(BASE, torch.tensor([logits] * n, dtype=torch.float64), batch, generation)


@pytest.mark.parametrize("position", [0, 1])
def test_ratios_have_mean_1_and_the_estimators_the_kl_as_mean(position):
    history = HISTORY + [3] * position
    sizes = set()
    for generation in SETTINGS:
        p, mass = by_hand(P, generation, position, history)
        tokens = sorted(p)
        sizes.add(len(tokens))
        assert sampled_from(P, generation, position, history) == pytest.approx(p, abs=1e-6)
        support = Support(torch.tensor(tokens * len(tokens)).int(), torch.tensor([len(tokens)] * len(tokens)))
        support = support if records(generation) else None
        old, new = (scored(x, generation, position, history, tokens, support) for x in (P, Q))
        q, _ = by_hand(Q, generation, position, history, only=tokens)
        weights = torch.tensor([p[t] for t in tokens], dtype=torch.float64)
        expected = torch.tensor([q[t] for t in tokens], dtype=torch.float64)
        assert torch.allclose(old.logprobs.exp(), weights, atol=1e-9)
        assert torch.allclose(new.logprobs.exp(), expected, atol=1e-9)
        assert torch.allclose(old.kept_mass, torch.tensor(mass, dtype=torch.float64), atol=1e-9)
        assert (weights * (new.logprobs - old.logprobs).exp()).sum() == pytest.approx(1, abs=1e-9)
        kl = sum(p[t] * math.log(p[t] / q[t]) for t in tokens)
        for estimator in ("k1", "k3"):
            values = kl_divergence_estimate(old.logprobs, new.logprobs, estimator)
            assert (weights * values).sum() == pytest.approx(kl, abs=1e-9)
        assert torch.allclose(old.entropy, torch.special.entr(weights).sum(), atol=1e-9)
    assert sizes == {2, 3, 4, 5}


def test_raw_logprobs_are_biased_as_documented():
    """Sampled with top-k 3 and scored raw: the mean ratio is not 1, and it is exactly 1 with nothing switched on."""
    for settings, unbiased in (({"top_k": 3}, False), ({}, True), ({"temperature": 0.7}, False)):
        generation = Generation(min_new_tokens=0, logprob_mode="raw", **settings)
        p, _ = by_hand(P, generation, 1, HISTORY)
        old, new = (scored(x, generation, 1, HISTORY, sorted(p), None) for x in (P, Q))
        softmax = torch.tensor(P, dtype=torch.float64).log_softmax(0)
        assert torch.allclose(old.logprobs, softmax[sorted(p)])
        weights = torch.tensor([p[t] for t in sorted(p)], dtype=torch.float64)
        mean = float((weights * (new.logprobs - old.logprobs).exp()).sum())
        assert (abs(mean - 1) < 1e-9) == unbiased
        assert unbiased or abs(mean - 1) > 0.1
