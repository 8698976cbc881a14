"""Cached decoding against plain recomputation, and its independence of everything but (row, position)."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlhf_exp.model.base import Base
from rlhf_exp.model.roles import Roles
from rlhf_exp.rollout.engine import Rollout, generate
from rlhf_exp.rollout.noise import row_key, uniform
from rlhf_exp.schema import Generation

SETTINGS = {
    "plain": Generation(max_new_tokens=10),
    "temperature": Generation(max_new_tokens=10, temperature=0.5, min_new_tokens=3),
    "top-k": Generation(max_new_tokens=10, top_k=20, temperature=1.5),
    "top-p": Generation(max_new_tokens=10, top_p=0.6),
}


def keys_of(prompts: list[list[int]], seed: int = 0) -> list[int]:
    return [row_key(seed, 1, i) for i in range(len(prompts))]


def run(base: Base, roles: Roles, prompts, keys, generation, role="policy") -> Rollout:
    return generate(base, lambda: roles.use(role), prompts, keys, generation)


def by_recomputation(base: Base, roles: Roles, prompt, key, generation, eos_id):
    """One row, no cache, no batch, no padding; the filters written out in Python."""
    ids, logprobs = list(prompt), []
    for position in range(generation.max_new_tokens):
        with torch.no_grad(), roles.use("policy"):
            logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1].double() / generation.temperature
        probs = logits.softmax(0).tolist()
        if position < generation.min_new_tokens:
            probs[eos_id] = 0.0
        order = sorted(range(len(probs)), key=lambda token: -probs[token])
        keep = order[: generation.top_k or None]
        total, mass, kept = sum(probs[token] for token in keep), 0.0, []
        for token in keep:
            if mass / total >= generation.top_p:
                break
            kept.append(token)
            mass += probs[token]
        u = float(uniform(torch.tensor([key]), position)) * mass
        cumulative = 0.0
        for token in sorted(kept):
            cumulative += probs[token]
            if cumulative > u:
                break
        ids.append(token)
        logprobs.append(torch.tensor(probs[token] / mass).log())
        if token == eos_id:
            break
    return ids[len(prompt) :], torch.stack(logprobs)


@pytest.fixture(params=SETTINGS, ids=str)
def generation(request) -> Generation:
    return SETTINGS[request.param]


def test_equals_recomputation_row_by_row(base, roles, prompts, generation, monkeypatch):
    # an EOS that this random model often draws, so that rows end at different times
    eos = run(base, roles, prompts, keys_of(prompts), SETTINGS["top-k"]).responses[0][4]
    monkeypatch.setattr(type(base), "eos_id", property(lambda _: eos))
    rollout = run(base, roles, prompts, keys_of(prompts), generation)
    for i, (prompt, key) in enumerate(zip(prompts, keys_of(prompts), strict=True)):
        tokens, logprobs = by_recomputation(base, roles, prompt, key, generation, eos)
        assert rollout.responses[i] == tokens
        assert (rollout.logprobs[i] - logprobs).abs().max() < 1e-4
        assert rollout.ended[i] == (tokens[-1] == eos)


def test_batch_order_and_neighbours_do_not_matter(base, roles, prompts, generation):
    keys = keys_of(prompts)
    whole = run(base, roles, prompts, keys, generation)
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    shuffled = run(base, roles, [prompts[i] for i in order], [keys[i] for i in order], generation)
    assert [shuffled.responses[order.index(i)] for i in range(8)] == whole.responses
    halves = [run(base, roles, prompts[i : i + 3], keys[i : i + 3], generation) for i in (0, 3, 6)]
    assert list(itertools.chain(*(half.responses for half in halves))) == whole.responses


def test_finished_rows_leave_and_the_others_go_on_unchanged(base, roles, prompts, monkeypatch):
    generation = Generation(max_new_tokens=12)
    free = run(base, roles, prompts, keys_of(prompts), generation)
    eos = free.responses[3][2]  # row 3 ends after three tokens, others at their first `eos` or never
    widths = []
    trunk = base.trunk.forward
    monkeypatch.setattr(
        base.trunk, "forward", lambda *a, **k: widths.append(len(k["input_ids"])) or trunk(*a, **k)
    )
    monkeypatch.setattr("rlhf_exp.rollout.engine.SHRINK_AT", 0.99)
    monkeypatch.setattr(type(base), "eos_id", property(lambda _: eos))
    ended = run(base, roles, prompts, keys_of(prompts), generation)
    for before, after, end in zip(free.responses, ended.responses, ended.ended, strict=True):
        length = before.index(eos) + 1 if eos in before[1:] else len(before)
        if before[0] != eos:  # at position 0 EOS is forbidden, so there the two differ
            assert after == before[:length]
            assert end == (eos in before)
    assert widths[0] == 8
    assert min(widths) < 8


def test_another_seed_gives_other_answers(base, roles, prompts):
    first, second = (run(base, roles, prompts, keys_of(prompts, seed), SETTINGS["plain"]) for seed in (0, 1))
    assert first.responses != second.responses


def test_the_role_is_what_samples(base, roles, prompts):
    policy, ref = (
        run(base, roles, prompts, keys_of(prompts), SETTINGS["plain"], role) for role in ("policy", "ref")
    )
    assert policy.responses != ref.responses
    assert roles.active is None


def test_support_holds_every_sampled_token(base, roles, prompts):
    rollout = run(base, roles, prompts, keys_of(prompts), Generation(max_new_tokens=6, top_k=7))
    for tokens, support in zip(rollout.responses, rollout.supports, strict=True):
        assert support.counts.tolist() == [7] * len(tokens)
        kept = support.ids.reshape(-1, 7).tolist()
        assert all(token in row for token, row in zip(tokens, kept, strict=True))
    assert run(base, roles, prompts, keys_of(prompts), SETTINGS["plain"]).supports is None
