"""Answers that a stop text ends: what is sampled, what is scored, and what its EOS is worth."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.algorithms.support import Support
from rlhf_exp.rollout.engine import Rollout, generate, judged, spoken
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.rollout.scoring import answer_logprobs, answers, chosen, hidden_before
from rlhf_exp.schema import Generation

KEYS = [row_key(0, 1, i) for i in range(8)]


def run(base, roles, prompts, **settings) -> tuple[Rollout, Generation]:
    generation = Generation(**{"max_new_tokens": 14, **settings})
    return generate(base, lambda: roles.use("policy"), prompts, KEYS, generation), generation


def clean(base, tokens: list[int], start: int, width: int = 1) -> str:
    """The text of `width` tokens from `start` on that are whole characters (this random model writes any bytes)."""
    texts = (base.tokenizer.decode(tokens[i : i + width]) for i in range(start, len(tokens)))
    return next(text for text in texts if text and "\ufffd" not in text)


def plainly(base, tokens: list[int], stops: list[str], least: int, most: int) -> tuple[list[int], int | None]:
    """The answer that free sampling gave, cut where its text first holds a stop: tokens, and how many before it."""
    for n in range(1, most):
        text = base.tokenizer.decode(tokens[:n])
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            start = min(starts)
            before = min(k for k in range(n + 1) if base.tokenizer.decode(tokens[:k])[:start] == text[:start])
            if before >= least:
                return [*tokens[:n], base.eos_id], before
    return tokens, None


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 40}, {"repetition_penalty": 1.3, "temperature": 0.8}], ids=str
)
def test_an_answer_ends_where_a_stop_is_complete(base, roles, prompts, settings, monkeypatch):
    monkeypatch.setattr("rlhf_exp.rollout.engine.SHRINK_AT", 0.9)
    free, _ = run(base, roles, prompts, **settings)
    decode = base.tokenizer.decode
    stops = [clean(base, free.responses[row], 3, width) for row, width in ((1, 1), (4, 1), (6, 2))]
    found, _ = run(base, roles, prompts, stop=stops, **settings)
    expected = [plainly(base, tokens, stops, 1, 14) for tokens in free.responses]
    assert found.responses == [tokens for tokens, _ in expected]
    assert found.stops == [before for _, before in expected]
    assert sum(before is not None for before in found.stops) >= 3
    assert None in found.stops
    for row, stop in enumerate(found.stops):
        if stop is not None:
            assert found.ended[row]
            assert spoken(found)[row] == free.responses[row][:stop]
            assert judged(found)[row] == [*free.responses[row][:stop], base.eos_id]
            assert found.logprobs[row][-1] == 0
            assert not any(text in decode(judged(found)[row][:-1]) for text in stops)
        n = len(found.responses[row]) - (stop is not None)
        assert (found.logprobs[row][:n] - free.logprobs[row][:n]).abs().max() < 1e-4


def test_a_stop_that_begins_an_answer_does_not_empty_it(base, roles, prompts):
    for least in (0, 1):
        free, _ = run(base, roles, prompts, min_new_tokens=least)
        # an answer that begins with a whole character
        row = next(
            i
            for i, tokens in enumerate(free.responses)
            if clean(base, tokens, 0) == base.tokenizer.decode(tokens[:1])
        )
        first = base.tokenizer.decode(free.responses[row][:1])
        found, _ = run(base, roles, prompts, stop=[first], min_new_tokens=least)
        if least:
            assert found.responses[row][:2] == free.responses[row][:2]
            assert len(spoken(found)[row]) >= 1
        else:
            assert found.responses[row] == [free.responses[row][0], base.eos_id]
            assert judged(found)[row] == [base.eos_id]


def test_the_last_token_leaves_no_room_for_eos(base, roles, prompts):
    free, _ = run(base, roles, prompts, max_new_tokens=4)
    last = base.tokenizer.decode(free.responses[5][3:4])
    assert "\ufffd" not in last
    assert last not in base.tokenizer.decode(free.responses[5][:3])
    found, _ = run(base, roles, prompts, max_new_tokens=4, stop=[last])
    assert found.responses[5] == judged(found)[5] == free.responses[5]
    assert (found.ended[5], found.stops[5]) == (False, None)


def test_spoken_and_judged_by_hand():
    rollout = Rollout([[1]] * 4, [[5, 6, 7, 2], [5, 6], [5, 2], [8, 2]], [True, False, True, True], [], None)
    assert spoken(rollout) == [[5, 6, 7], [5, 6], [5], [8]]
    assert judged(rollout) == rollout.responses
    rollout = rollout._replace(stops=[1, None, None, 0])
    assert spoken(rollout) == [[5], [5, 6], [5], []]
    assert judged(rollout) == [[5, 2], [5, 6], [5, 2], [2]]


@pytest.mark.parametrize("mode", ["sampled", "raw"])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"repetition_penalty": 1.3}], ids=str)
def test_the_eos_of_a_stop_is_no_choice(base, roles, prompts, settings, mode):
    """Log-prob 0 under every role, entropy 0, no gradient; the other tokens are scored as if it were not there."""
    free, _ = run(base, roles, prompts, **settings)
    stops = [clean(base, free.responses[row], 4) for row in (0, 3, 6)]
    rollout, generation = run(base, roles, prompts, stop=stops, logprob_mode=mode, **settings)
    rows = [4, 0, 6, 3, 7]
    batch = answers(rollout, rows, base)
    certain = ~batch.chosen
    assert certain.sum() == sum(rollout.stops[row] is not None for row in rows) >= 2
    assert (batch.targets[certain] == base.eos_id).all()
    for role in ("policy", "ref"):
        hidden = hidden_before(roles, role, batch).detach().requires_grad_()
        scored = answer_logprobs(base, hidden, batch, generation)
        assert (scored.logprobs[certain] == 0).all()
        assert (scored.entropy[certain] == 0).all()
        assert (scored.kept_mass[certain] == 1).all()
        scored.logprobs.sum().backward()
        assert (hidden.grad[certain] == 0).all()
        assert (hidden.grad[batch.chosen].abs().sum(1) > 0).all()
        # the same answers without that EOS
        ends = [stop is not None for stop in rollout.stops]
        cut = rollout._replace(
            responses=[r[:-1] if end else r for r, end in zip(rollout.responses, ends, strict=True)],
            supports=rollout.supports
            and [
                s.rows(torch.arange(len(s.counts) - end))
                for s, end in zip(rollout.supports, ends, strict=True)
            ],
            stops=None,
        )
        plain = answers(cut, rows, base)
        assert plain.chosen is None
        hidden_plain = hidden_before(roles, role, plain)
        assert (chosen(hidden, batch) - hidden_plain).abs().max() < 1e-4
        expected = answer_logprobs(base, hidden_plain, plain, generation).logprobs
        assert (scored.logprobs[batch.chosen] - expected).abs().max() < 1e-4
        if role == "policy":
            sampled = torch.cat([rollout.logprobs[row] for row in rows])
            assert (scored.logprobs - sampled).abs().max() < 1e-4
    if rollout.supports is not None:
        row = next(row for row in rows if rollout.stops[row] is not None)
        last = rollout.supports[row].rows(torch.tensor([len(rollout.responses[row]) - 1]))
        assert last.ids.tolist() == [base.eos_id]
        assert Support.concat(rollout.supports).counts.min() >= 1
