"""Cached decoding against plain recomputation, and its independence of everything but (row, position)."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_exp.model.base import Base
from rlhf_exp.model.roles import Roles
from rlhf_exp.rollout import engine
from rlhf_exp.rollout.engine import Rollout, generate
from rlhf_exp.rollout.noise import row_key, uniform
from rlhf_exp.schema import Generation

SETTINGS = {
    "plain": Generation(max_new_tokens=10),
    "temperature": Generation(max_new_tokens=10, temperature=0.5, min_new_tokens=3),
    "top-k": Generation(max_new_tokens=10, top_k=20, temperature=1.5),
    "top-p": Generation(max_new_tokens=10, top_p=0.6),
    "min-p": Generation(max_new_tokens=10, min_p=0.3, min_new_tokens=0, begin_suppress_tokens=["eos"]),
    "penalty": Generation(max_new_tokens=10, repetition_penalty=1.8, temperature=0.5),
    "all": Generation(
        max_new_tokens=10, repetition_penalty=1.3, temperature=1.5, top_k=60, top_p=0.8, min_p=0.1
    ),
    "greedy": Generation(max_new_tokens=10, greedy=True, repetition_penalty=1.2),
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
            logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        for token in set(ids):
            factor = generation.repetition_penalty
            logits[token] *= factor if logits[token] < 0 else 1 / factor
        probs = (logits / generation.temperature).softmax(0).tolist()
        if position < generation.min_new_tokens or (position == 0 and generation.begin_suppress_tokens):
            probs[eos_id] = 0.0
        order = sorted(range(len(probs)), key=lambda token: -probs[token])
        keep = order[: generation.top_k or None]
        total, mass, kept = sum(probs[token] for token in keep), 0.0, []
        for token in keep:
            if mass / total >= generation.top_p or probs[token] < generation.min_p * probs[order[0]]:
                break
            kept.append(token)
            mass += probs[token]
        u = float(uniform(torch.tensor([key]), position)) * mass
        cumulative = 0.0
        for token in sorted(kept):
            cumulative += probs[token]
            if cumulative > u:
                break
        token = order[0] if generation.greedy else token
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


def test_padding_is_not_penalised_though_it_is_eos(base, roles, monkeypatch):
    """A short prompt beside a long one: its padding is full of EOS, whose logit must stay."""
    assert base.pad_id == base.eos_id
    prompts = [[9], [5, 6, 7, 8] * 6]
    keys, eos = [3, 4], base.eos_id
    # EOS by far the most probable: it is drawn unless it was penalised down
    linear = torch.nn.functional.linear

    def likely(*arguments):
        logits = linear(*arguments)
        if logits.shape[-1] == base.output_layer[0].shape[0]:
            logits = logits - logits.amax(1, keepdim=True)
            logits[:, eos] = 30.0
        return logits

    monkeypatch.setattr("rlhf_exp.rollout.engine.torch.nn.functional.linear", likely)
    generation = Generation(max_new_tokens=3, min_new_tokens=0, repetition_penalty=1e9)
    assert run(base, roles, prompts, keys, generation).responses == [[eos], [eos]]
    prompts[0] = [eos]  # where EOS is a token of the prompt it is penalised
    assert run(base, roles, prompts, keys, generation).responses[0] != [eos]


def test_greedy_is_that_of_transformers(base, roles, prompts):
    for penalty in (1.0, 1.4):
        generation = Generation(max_new_tokens=12, min_new_tokens=2, greedy=True, repetition_penalty=penalty)
        rollout = run(base, roles, prompts, keys_of(prompts), generation)
        assert run(base, roles, prompts, keys_of(prompts, seed=1), generation).responses == rollout.responses
        assert rollout.supports is None
        for prompt, response in zip(prompts, rollout.responses, strict=True):
            with roles.use("policy"):
                theirs = base.model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    do_sample=False,
                    max_new_tokens=12,
                    min_new_tokens=2,
                    repetition_penalty=penalty,
                    pad_token_id=base.pad_id,
                )
            assert theirs[0, len(prompt) :].tolist() == response


def test_a_flat_distribution_takes_more_candidates_and_gives_the_same(base, roles, prompts, monkeypatch):
    generation = Generation(max_new_tokens=8, top_p=0.7, temperature=1.4)
    whole = run(base, roles, prompts, keys_of(prompts), generation)
    sizes = []
    sample = engine.sample
    monkeypatch.setattr(engine, "FIRST", 4)
    monkeypatch.setattr(engine, "MORE", 3)
    monkeypatch.setattr(engine, "sample", lambda *a, **k: sizes.append(a[-1]) or sample(*a, **k))
    few = run(base, roles, prompts, keys_of(prompts), generation)
    assert min(sizes) < 40 < max(sizes)
    assert few.responses == whole.responses
    for one, other in zip(few.supports, whole.supports, strict=True):
        assert torch.equal(one.to_mask(600), other.to_mask(600))
        assert len(set(other.counts.tolist())) > 1


def test_raw_logprobs_are_of_temperature_1_without_processors(base, roles, prompts):
    settings = {"max_new_tokens": 6, "temperature": 0.6, "top_k": 30, "repetition_penalty": 1.5}
    sampled, raw = (
        run(base, roles, prompts, keys_of(prompts), Generation(**settings, logprob_mode=mode))
        for mode in ("sampled", "raw")
    )
    assert raw.responses == sampled.responses
    assert raw.supports is None
    for prompt, response, found, other in zip(
        prompts, raw.responses, raw.logprobs, sampled.logprobs, strict=True
    ):
        with torch.no_grad(), roles.use("policy"):
            logits = base.model(input_ids=torch.tensor([prompt + response])).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        assert (found - expected[range(len(response)), response]).abs().max() < 1e-4
        assert (found - other).abs().max() > 0.1


@pytest.mark.parametrize("name", ["plain", "top-p", "all", "greedy"])
def test_a_step_waits_for_the_device_once_and_holds_one_step_of_logits(
    base, roles, prompts, name, monkeypatch
):
    waits, largest = [], 0

    def counted(method):
        original = getattr(torch.Tensor, method)

        def count(self, *arguments, **keywords):
            if sys._getframe(1).f_globals["__name__"].startswith("rlhf_exp.rollout"):
                waits.append(method)
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(torch.Tensor, method, count)

    for method in ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
        counted(method)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    steps = 40
    generation = dataclasses.replace(SETTINGS[name], max_new_tokens=steps, min_new_tokens=steps - 1)
    with Largest():
        rollout = run(base, roles, prompts, keys_of(prompts), generation)
    assert [len(response) for response in rollout.responses] == [steps] * 8
    assert waits.count("tolist") == steps
    assert set(waits) <= {"tolist", "cpu"}
    assert waits.count("cpu") <= 1  # the kept sets, at the end
    vocabulary, width = base.output_layer[0].shape
    assert largest <= max(len(prompts) * vocabulary, vocabulary * width, len(prompts) * 64 * 128)
    assert largest < len(prompts) * steps * vocabulary / 4


def test_logits_that_are_no_distribution_are_named(base, roles, prompts, monkeypatch):
    linear = torch.nn.functional.linear

    def broken(x, weight, *rest):
        logits = linear(x, weight, *rest)
        if weight is base.output_layer[0]:
            logits[5, 3] = float("nan")
        return logits

    monkeypatch.setattr("rlhf_exp.rollout.engine.torch.nn.functional.linear", broken)
    with pytest.raises(FloatingPointError, match="row 5, answer token 0: the logits hold nan"):
        run(base, roles, prompts, keys_of(prompts), SETTINGS["top-k"])
