"""The tiny model in float32: however scores are computed, they are the same."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.probes.scorer import PADDING, LearnedScorer

EOS = 2
ROWS = [
    ([5, 6, 7, 8], [9, EOS]),
    ([30, 31], [EOS]),
    ([5, 6, 7, 8], [10, 11, 12, 13, 14, EOS]),
    ([40, 41, 42, 43, 44], [45, 46, EOS]),  # the only answer to its prompt
    ([5, 6, 7, 8], [EOS]),
    ([30, 31], [EOS, EOS, EOS, 50]),  # PAD is EOS: nothing may be told by it
]


@pytest.fixture
def expected(base, roles):
    """One forward a row, without a cache, a batch or padding."""
    head, found = ScalarHead(base.hidden_size).reset(0), []
    for prompt, answer in ROWS:
        with torch.no_grad():
            found.append(head(roles.trunk("ref", torch.tensor([prompt + answer]))[0, -1]).item())
    assert len({round(value, 3) for value in found}) == len(ROWS)
    return found


@pytest.fixture
def scorer(base, roles):
    return lambda size=16, **more: LearnedScorer(
        roles, "ref", ScalarHead(base.hidden_size).reset(0), size, **more
    )


@pytest.mark.parametrize("size", [1, 2, 16])
def test_answers_that_share_their_prompt_score_as_each_alone(scorer, expected, size):
    assert scorer(size)(ROWS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("way", ["alone", "padded", "neighbours"])
def test_padding_and_neighbours_change_nothing(base, scorer, expected, way):
    assert base.pad_id == EOS
    assert getattr(scorer(4), way)(ROWS) == pytest.approx(expected, abs=1e-5)


def test_padded_rows_are_padded_and_neighbours_share_a_batch(base, roles, scorer, monkeypatch):
    shapes = []
    trunk = roles.trunk

    def seen(role, ids, **more):
        shapes.append((tuple(ids.shape), ids[:, -1].tolist()))
        return trunk(role, ids, **more)

    monkeypatch.setattr(roles, "trunk", seen)
    scorer().padded(ROWS[:2])
    assert shapes == [((1, 6 + PADDING), [base.pad_id]), ((1, 3 + PADDING), [base.pad_id])]
    shapes.clear()
    scorer().neighbours(ROWS)
    assert [shape for shape, _ in shapes] == [(6, 10)]


def test_it_tells_how_far_it_is(scorer):
    told = []
    found = scorer(2, tell=told.append)
    found(ROWS)
    found(ROWS[:1])
    assert told == [1, 2, 3, 4]  # prompts, of both calls


def test_the_prompt_is_computed_once(base, scorer, monkeypatch):
    widths = []
    forward = base.trunk.forward

    def seen(*arguments, **more):
        widths.append(tuple(more["input_ids"].shape))
        return forward(*arguments, **more)

    monkeypatch.setattr(base.trunk, "forward", seen)
    scorer()(ROWS)
    assert sorted(widths) == sorted([(1, 4), (3, 6), (1, 2), (2, 4), (1, 8)])
