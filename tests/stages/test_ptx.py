"""Demonstrations mixed into PPO, against full logits."""

from __future__ import annotations

import pytest
import torch

from rlhf_exp.data.load import load_view
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.stages import ptx
from rlhf_exp.stages.ptx import Demonstrations
from tests.stages.plain import (
    forward,
    gradients,
    updated,
)


@pytest.fixture
def demonstrations() -> Demonstrations:
    draw = torch.Generator().manual_seed(11)
    prompts, responses = (
        [torch.randint(3, 512, (n,), generator=draw).tolist() for n in lengths]
        for lengths in ((2, 5, 1, 4, 3), (3, 1, 6, 2, 4))
    )
    return Demonstrations(Rollout(prompts, responses, [True] * 5, [torch.zeros(0)] * 5, None), seed=0)


def plain_ptx(actors, demonstrations, rows):
    """- mean over all answer tokens of log softmax(logits)[token], a row at a time."""
    parts = []
    for row in rows:
        prompt, response = demonstrations.rows.prompts[row], demonstrations.rows.responses[row]
        logits, _ = forward(actors, "policy", prompt, response)
        parts.append(-logits.log_softmax(1)[range(len(response)), response])
    return torch.cat(parts).mean()


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_the_loss_of_demonstrations(actors, demonstrations, micro):
    actors = actors["trunk"]
    rows = [4, 0, 2, 1]
    expected = plain_ptx(actors, demonstrations, rows)
    expected.backward()
    wanted = gradients(actors)
    total = 0.0
    for loss in ptx.losses(actors, demonstrations, rows, micro):
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), abs=1e-5)
    for got, want in zip(gradients(actors), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_a_batch_is_as_wide_as_its_own_rows(actors, demonstrations, monkeypatch):
    """Row 2 has the longest answer, 6; of the others, two by two (0 1 and 3 4), the longest have 3 and 4."""
    seen = []

    def spy(*arguments):
        found = collate(*arguments)
        seen.append((tuple(found.mask.shape), found.ids.shape[1]))
        return found

    collate = ptx.answers
    monkeypatch.setattr(ptx, "answers", spy)
    for _ in ptx.losses(actors["trunk"], demonstrations, [0, 1, 3, 4], 2):
        pass
    # rows 0 and 1 are of 2 + 3 and 5 + 1 tokens, rows 4 and 3 of 3 + 4 and 4 + 2
    assert sorted(seen) == [((2, 3), 6), ((2, 4), 7)]


def test_an_update_with_demonstrations_adds_their_gradient(actors, rollout, ppo_config, demonstrations):
    """One step of gradient descent from the same start, with and without: the difference is gamma times it."""
    actors = actors["trunk"]
    start = [p.detach().clone() for p in actors.trainable()]
    plan_config = ppo_config({"ptx_coef": 1.5, "ptx_ratio": 0.5}, optim={"max_grad_norm": 1e9})
    rows = demonstrations.batch(1, 4)  # half of 8 answers
    plain_ptx(actors, demonstrations, rows).backward()
    wanted = gradients(actors)
    ends, metrics = {}, {}
    for given in (None, demonstrations):
        with torch.no_grad():
            for p, value in zip(actors.trainable(), start, strict=True):
                p.copy_(value)
        metrics[given is None], _ = updated(plan_config, actors, rollout, move=False, demonstrations=given)
        ends[given is None] = [p.detach().clone() for p in actors.trainable()]
    moved = 0.0
    for with_, without, gradient in zip(ends[False], ends[True], wanted, strict=True):
        assert torch.allclose(with_ - without, -0.05 * 1.5 * gradient, atol=1e-5)
        moved = max(moved, float((with_ - without).abs().max()))
    assert moved > 1e-3
    with torch.no_grad():
        for p, value in zip(actors.trainable(), start, strict=True):
            p.copy_(value)
        loss = plain_ptx(actors, demonstrations, rows)
    assert metrics[False]["ptx/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert "ptx/loss" not in metrics[True]


def test_demonstrations_come_round_once_an_epoch(demonstrations):
    rows = [row for number in range(1, 6) for row in demonstrations.batch(number, 3)]
    for epoch in (rows[:5], rows[5:10], rows[10:]):
        assert sorted(epoch) == list(range(5))


def test_the_loaded_demonstrations_are_those_of_sft(base, ppo_config, context):
    config = ppo_config({"ptx_coef": 1.0})
    found = Demonstrations.load(config, context())
    rows = load_view(config.dataset, "demonstrations", "train")
    assert len(found.rows.prompts) == len(rows)
    answer = base.tokenizer(f" {rows[3].response}", add_special_tokens=False)["input_ids"]
    assert found.rows.responses[3] == [*answer, base.eos_id][: config.dataset.max_response_tokens]
    assert Demonstrations.load(ppo_config(), context("other")) is None
