"""Scoring forwards: padding and batching never matter, and the log-probs are those that were sampled from."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from rlhf_exp.rollout import division
from rlhf_exp.rollout.engine import Rollout, generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.rollout.scoring import (
    answer_logprobs,
    answers,
    by_length,
    hidden_before,
    untruncated_kl,
)
from rlhf_exp.schema import Generation


def sample(base, roles, prompts, generation) -> Rollout:
    keys = [row_key(0, 1, i) for i in range(len(prompts))]
    return generate(base, lambda: roles.use("policy"), prompts, keys, generation)


@pytest.mark.parametrize(
    "generation",
    [
        Generation(max_new_tokens=9),
        Generation(max_new_tokens=9, temperature=0.7, min_new_tokens=4),
        Generation(max_new_tokens=9, top_p=0.7, temperature=1.3),
        Generation(max_new_tokens=9, top_k=10, min_new_tokens=2),
        Generation(max_new_tokens=9, min_p=0.2, begin_suppress_tokens=["eos"], min_new_tokens=0),
        Generation(max_new_tokens=9, repetition_penalty=1.6, begin_suppress_tokens=["a", " the"]),
        Generation(
            max_new_tokens=9, repetition_penalty=1.3, temperature=0.6, top_k=80, top_p=0.9, min_p=0.05
        ),
        Generation(max_new_tokens=9, repetition_penalty=1.6, top_k=20, logprob_mode="raw"),
        Generation(max_new_tokens=9, repetition_penalty=1.6, temperature=0.5, greedy=True),
    ],
    ids=["plain", "temperature", "top-p", "top-k", "min-p", "penalty", "all", "raw", "greedy"],
)
@torch.no_grad()
def test_scoring_forward_gives_the_samplers_logprobs(base, roles, prompts, generation):
    rollout = sample(base, roles, prompts, generation)
    batch = answers(rollout, range(len(prompts)), base)
    scored = answer_logprobs(base, hidden_before(roles, "policy", batch), batch, generation)
    assert (scored.logprobs - torch.cat(rollout.logprobs)).abs().max() < 2e-5
    if generation.logprob_mode == "raw":
        assert (scored.kept_mass == 1).all()
    elif generation.top_k or generation.top_p < 1 or generation.min_p > 0:
        assert scored.kept_mass.max() < 1
    elif generation.min_new_tokens == 1:
        # only what is forbidden at the first position is missing
        assert (scored.kept_mass[batch.first > 0] == 1).all()
        assert (scored.kept_mass[batch.first == 0] < 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.6, "top_k": 20, "stop": ["e"]},
        {"top_p": 0.5, "temperature": 0.7, "min_new_tokens": 3},
        {"temperature": 0.7, "min_new_tokens": 3},
        {},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_kept_mass_is_known_without_kept_sets(base, roles, prompts, settings):
    """logprob_mode=raw draws the same answers; what can be drawn has the mass that scoring finds in mode sampled."""
    settings = {"max_new_tokens": 9, **settings}
    raw = sample(base, roles, prompts, Generation(**settings, logprob_mode="raw"))
    sampled = sample(base, roles, prompts, Generation(**settings))
    assert raw.responses == sampled.responses
    assert raw.supports is None and sampled.masses is None
    batch = answers(sampled, range(len(prompts)), base)
    hidden = hidden_before(roles, "policy", batch)
    expected = answer_logprobs(base, hidden, batch, Generation(**settings)).kept_mass
    assert (torch.cat(raw.masses) - expected).abs().max() < 2e-5
    assert expected.min() < 1
    # as they travel between ranks
    hands = [[0, 2, 4], [i for i in range(len(prompts)) if i not in (0, 2, 4)]]
    columns = raw._asdict()
    parts = [
        (rows, division.pack(Rollout(**{k: v and [v[i] for i in rows] for k, v in columns.items()})))
        for rows in hands
    ]
    again = division.joined(prompts, parts)
    assert all(torch.equal(*pair) for pair in zip(again.masses, raw.masses, strict=True))


@torch.no_grad()
def test_rows_alone_equal_rows_in_a_batch(base, roles, prompts):
    generation = Generation(max_new_tokens=7)
    rollout = sample(base, roles, prompts, generation)
    together = answers(rollout, [4, 1, 6], base)
    logprobs = answer_logprobs(base, hidden_before(roles, "ref", together), together, generation).logprobs
    alone = []
    for row in (4, 1, 6):
        ids = torch.tensor([rollout.prompts[row] + rollout.responses[row]])
        with roles.use("ref"):
            logits = base.model(input_ids=ids).logits[0]
        start = len(rollout.prompts[row])
        for t, token in enumerate(rollout.responses[row]):
            row_logits = logits[start + t - 1].clone()
            if t == 0:
                row_logits[base.eos_id] = -torch.inf
            alone.append(row_logits.log_softmax(0)[token])
    assert (logprobs - torch.stack(alone)).abs().max() < 1e-5


def test_answers_by_hand(base):
    rollout = Rollout([[5, 6], [7]], [[8], [9, 10, 2]], [False, True], [torch.zeros(1), torch.zeros(3)], None)
    batch = answers(rollout, [1, 0], base)
    assert batch.rows.tolist() == [1, 0]
    assert batch.ids.tolist() == [[7, 9, 10, 2], [5, 6, 8, base.pad_id]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    # row 1's tokens are predicted at positions 0, 1, 2; row 0's at position 1
    assert [part.tolist() for part in batch.before] == [[0, 0, 0, 1], [0, 1, 2, 1]]
    assert batch.targets.tolist() == [9, 10, 2, 8]
    assert batch.first.tolist() == [0, 1, 2, 0]


def test_groups_by_length(base):
    rollout = Rollout([[1] * n for n in (5, 1, 3, 2)], [[1]] * 4, [False] * 4, [], None)
    assert by_length(rollout, [0, 1, 2, 3], 3) == [[1, 3, 2], [0]]
    assert by_length(rollout, [2, 0], 8) == [[2, 0]]


@torch.no_grad()
def test_the_penalty_of_another_role_by_the_definition(base, roles, prompts):
    """The reference on the policy's answers: transformers' processor on each position of each row, alone."""
    generation = Generation(max_new_tokens=7, repetition_penalty=1.7, temperature=0.6)
    rollout = sample(base, roles, prompts, generation)
    batch = answers(rollout, [6, 2, 4], base)
    got = answer_logprobs(base, hidden_before(roles, "ref", batch), batch, generation).logprobs
    expected = []
    for row in (6, 2, 4):
        ids = torch.tensor([rollout.prompts[row] + rollout.responses[row]])
        with roles.use("ref"):
            logits = base.model(input_ids=ids).logits
        start = len(rollout.prompts[row])
        for t, token in enumerate(rollout.responses[row]):
            scores = logits[:, start + t - 1].clone()
            scores = RepetitionPenaltyLogitsProcessor(1.7)(ids[:, : start + t], scores)[0] / 0.6
            if t == 0:
                scores[base.eos_id] = -torch.inf
            expected.append(scores.log_softmax(0)[token])
    assert (got - torch.stack(expected)).abs().max() < 1e-5


@torch.no_grad()
def test_untruncated_kl_by_the_definition(base, roles, prompts, monkeypatch):
    monkeypatch.setattr("rlhf_exp.algorithms.logits.LOGIT_BUDGET", 512 * 5)  # several chunks
    rollout = sample(base, roles, prompts, Generation(max_new_tokens=5, top_k=3))
    batch = answers(rollout, range(len(prompts)), base)
    hidden = [hidden_before(roles, role, batch) for role in ("policy", "ref")]
    got = untruncated_kl(base, *hidden)
    weight, _ = base.output_layer
    p, q = ((h.double() @ weight.double().T).softmax(-1) for h in hidden)
    assert (got - (p * (p / q).log()).sum(-1)).abs().max() < 1e-5
    assert untruncated_kl(base, hidden[0], hidden[0]).abs().max() == 0
