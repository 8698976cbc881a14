from __future__ import annotations

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf_exp.rollout.sampler import draw, kept, restricts, scaled_logits
from rlhf_exp.schema import Generation

PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])
LOGITS = PROBS.log()


def tokens(mask: torch.Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


def test_kept_sets_by_hand():
    assert tokens(kept(LOGITS, 2, 1.0)) == [1, 3]
    # .4 < .5: the next one is needed too; .7 reaches .7 exactly, so two are enough
    assert tokens(kept(LOGITS, 0, 0.5)) == [1, 3]
    assert tokens(kept(LOGITS, 0, 0.71)) == [1, 3, 4]
    assert tokens(kept(LOGITS, 0, 0.01)) == [1]
    # top-k first: of .4 and .3 renormalised (.571, .429) p = .5 keeps one
    assert tokens(kept(LOGITS, 2, 0.5)) == [1]
    assert tokens(kept(LOGITS, 9, 1.0)) == [0, 1, 2, 3, 4]
    forbidden = LOGITS.clone()
    forbidden[0, 1] = -torch.inf
    assert tokens(kept(forbidden, 2, 1.0)) == [3, 4]


def test_kept_sets_equal_hugging_face():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 2
    for top_k, top_p in [(5, 1.0), (0, 0.3), (0, 0.9), (7, 0.6), (1, 0.5)]:
        theirs = logits
        if top_k:
            theirs = TopKLogitsWarper(top_k)(None, theirs)
        if top_p < 1:
            theirs = TopPLogitsWarper(top_p)(None, theirs)
        assert torch.equal(kept(logits, top_k, top_p), theirs > -torch.inf), (top_k, top_p)


def test_ties_keep_exactly_k():
    assert tokens(kept(torch.zeros(1, 5), 2, 1.0)) == [0, 1]


def test_temperature_and_forbidden_eos():
    generation = Generation(temperature=2.0, min_new_tokens=2)
    for position, eos in [(0, -torch.inf), (1, -torch.inf), (2, 1.0)]:
        got = scaled_logits(torch.tensor([[4.0, 2.0, -6.0]]), generation, position, eos_id=1)
        assert got.tolist() == [[2.0, eos, -3.0]]


def test_draw_inverts_the_distribution_function():
    # cumulative: .1 .5 .55 .85 1
    u = torch.tensor(
        [0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.5499, 0.5501, 0.8499, 0.8501, 0.999999], dtype=torch.float64
    )
    assert draw(LOGITS.expand(10, 5), u).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_forbidden_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    u = torch.tensor([0.0, 0.25, 0.49999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(6, 5), u).tolist() == [1, 1, 1, 3, 3, 3]


def test_frequencies_are_the_probabilities():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(draw(LOGITS.expand(10_000, 5), u), minlength=5)
    assert (counts / 10_000 - PROBS[0]).abs().max() < 2e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_distribution_is_named(bad):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match="row 1"):
        draw(logits, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="row 0"):
        draw(torch.full((1, 4), -torch.inf), torch.zeros(1, dtype=torch.float64))


def test_when_a_support_is_recorded():
    assert not restricts(Generation(temperature=0.7, min_new_tokens=3))
    assert restricts(Generation(top_k=5))
    assert restricts(Generation(top_p=0.9))
