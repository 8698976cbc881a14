from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import GenerationConfig

from rlhf_exp.rollout import sampler
from rlhf_exp.rollout.sampler import draw, kept, processed, records, restricts, sample
from rlhf_exp.schema import Generation

PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])
LOGITS = PROBS.log()


def tokens(logits: torch.Tensor = LOGITS, most: int = sampler.FIRST, **settings) -> list[int]:
    """The kept set of the first row."""
    found = kept(logits, Generation(**settings), most)
    assert (found.logits[0] > -torch.inf).sum() == found.counts[0]
    return sorted(found.ids[0, : found.counts[0]].tolist())


def test_kept_sets_by_hand():
    assert tokens(top_k=2) == [1, 3]
    # .4 < .5: the next one is needed too; .7 reaches .7 exactly, so two are enough
    assert tokens(top_p=0.5) == [1, 3]
    assert tokens(top_p=0.71) == [1, 3, 4]
    assert tokens(top_p=0.01) == [1]
    # top-k first: of .4 and .3 renormalised (.571, .429) p = .5 keeps one
    assert tokens(top_k=2, top_p=0.5) == [1]
    assert tokens(top_k=9) == [0, 1, 2, 3, 4]
    # a quarter of .4 is .1, which token 0 has; .38 of it is .152, more than token 4 has
    assert tokens(min_p=0.24) == [0, 1, 3, 4]
    assert tokens(min_p=0.38) == [1, 3]
    assert tokens(min_p=1.0) == [1]
    assert tokens(top_p=0.71, min_p=0.38) == [1, 3]
    forbidden = LOGITS.clone()
    forbidden[0, 1] = -torch.inf
    assert tokens(forbidden, top_k=2) == [3, 4]
    assert tokens(forbidden, top_k=5) == [0, 2, 3, 4]
    assert tokens(forbidden, top_p=0.99999) == [0, 2, 3, 4]


def test_ties_keep_exactly_k():
    assert tokens(torch.zeros(1, 5), top_k=2) == [0, 1]
    assert tokens(torch.tensor([[1.0, 2.0, -0.0, 0.0, 2.0, 2.0]]), top_k=2) == [1, 4]
    assert tokens(torch.tensor([[-1.0, -0.0, 0.0, -1.0]]), top_k=1) == [1]
    # as bfloat16 logits are: few values, many ties; the oracle is Python's stable sort
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for k in (1, 7, 100, 299):
        for row in logits:
            best = sorted(range(300), key=lambda token, row=row: -row[token].item())[:k]
            assert kept(row[None], Generation(top_k=k)).ids.tolist() == [best]


@pytest.mark.parametrize("settings", [{"top_p": 0.8}, {"min_p": 0.3}, {"top_p": 0.9, "min_p": 0.1}], ids=str)
def test_few_candidates_say_so_or_give_the_same_set(settings):
    """At most K are looked at: the kept set is that of the whole vocabulary, or the row is `short`."""
    scale = torch.linspace(0.1, 6, 40)[:, None]
    logits = scale * torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    whole, few = (kept(logits, Generation(**settings), most) for most in (200, 12))
    assert not whole.short.any()
    assert 0 < few.short.sum() < 40
    assert few.short.tolist() == (whole.counts >= 12).tolist()
    for row in (~few.short).nonzero().flatten().tolist():
        count = whole.counts[row]
        assert few.counts[row] == count
        assert few.ids[row, :count].tolist() == whole.ids[row, :count].tolist()


def test_temperature_and_forbidden_tokens():
    generation = Generation(temperature=2.0)
    logits = torch.tensor([[4.0, 2.0, -6.0]])
    for position, eos, first in [(0, -torch.inf, -torch.inf), (1, -torch.inf, -3.0), (2, 1.0, -3.0)]:
        got = processed(logits, generation, position, {1: 2, 2: 1})
        assert got.tolist() == [[2.0, eos, first]]
    assert logits.tolist() == [[4.0, 2.0, -6.0]]  # the raw ones are left alone


def test_repetition_penalty_by_hand():
    logits = torch.tensor([[4.0, -2.0, 6.0, 0.0], [4.0, -2.0, 6.0, 1.0]])
    seen = torch.tensor([[1, 0, 0], [2, 2, 2]])
    got = processed(logits, Generation(repetition_penalty=2.0, temperature=0.5), 5, {}, seen)
    assert got.tolist() == [[4.0, -8.0, 12.0, 0.0], [8.0, -4.0, 6.0, 2.0]]


def drawn_settings(count: int) -> list[Generation]:
    """Settings in which every processor is on half of the time."""
    draws = random.Random(0)

    def one(off, low, high):
        return off if draws.random() < 0.5 else draws.uniform(low, high)

    return [
        Generation(
            repetition_penalty=one(1.0, 0.6, 2.0),
            min_new_tokens=draws.randint(0, 3),
            begin_suppress_tokens=draws.choice([[], ["eos"]]),
            temperature=one(1.0, 0.3, 2.0),
            top_k=draws.choice([0, 0, 1, 5, 20, 400]),
            top_p=one(1.0, 0.05, 0.99),
            min_p=one(0.0, 0.001, 0.9),
        )
        for _ in range(count)
    ]


def test_the_chain_is_that_of_transformers(base):
    """Their own list of processors, in their order, on left-padded rows whose PAD is EOS."""
    draw = torch.Generator().manual_seed(0)
    eos, vocabulary = base.eos_id, base.output_layer[0].shape[0]
    lengths, width, differing = [3, 12, 7, 1], 12, set()
    for number, (generation, new) in enumerate(itertools.product(drawn_settings(60), (0, 1, 2))):
        logits = 3 * torch.randn(4, vocabulary, generator=draw)
        ids = torch.randint(3, vocabulary, (4, width + new), generator=draw)
        mask = torch.arange(width + new) >= width - torch.tensor(lengths)[:, None]
        ids = ids.where(mask, eos)
        begin = [eos] if generation.begin_suppress_tokens else []
        config = GenerationConfig(
            do_sample=True,
            eos_token_id=eos,
            pad_token_id=eos,
            begin_suppress_tokens=begin or None,
            **{
                name: getattr(generation, name)
                for name in ("repetition_penalty", "min_new_tokens", "temperature", "top_k", "top_p", "min_p")
            },
        )
        base.model._prepare_special_tokens(config, kwargs_has_attention_mask=True)
        chain = base.model._get_logits_processor(
            config, input_ids_seq_length=width, device="cpu", model_kwargs={"attention_mask": mask}
        )
        theirs = chain(ids, logits.clone())
        limits = {eos: max(generation.min_new_tokens, len(begin))}
        seen = ids.where(mask, ids[:, -1:]) if generation.repetition_penalty != 1 else None
        ours = processed(logits, generation, new, limits, seen)
        if restricts(generation):
            found = kept(ours, generation)
            ours = torch.full_like(ours, -torch.inf).scatter(1, found.ids, found.logits)
        assert torch.equal(ours > -torch.inf, theirs > -torch.inf), (number, generation)
        finite = theirs > -torch.inf
        assert torch.allclose(ours[finite], theirs[finite], atol=1e-6, rtol=1e-6), (number, generation)
        differing.add(int(finite.sum()))
    assert len(differing) > 20  # sizes of all kinds


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 300, "min_p": 0.01}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["sampled", "raw"])
def test_logprobs_are_of_the_distribution_that_the_draws_have(settings, mode):
    """All draws at a fine grid of u: their frequencies against the log-probs that come with them."""
    generation = Generation(logprob_mode=mode, **settings)
    logits = 2 * torch.randn(1, 400, generator=torch.Generator().manual_seed(3))
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = sample(logits.expand(n, -1), u, generation, 0, {7: 1})
    frequency = torch.bincount(drawn.tokens, minlength=400) / n
    assert frequency[7] == 0
    if mode == "raw":
        assert torch.allclose(drawn.logprobs, logits[0].log_softmax(0)[drawn.tokens], atol=1e-5)
    else:
        assert (drawn.logprobs.exp() - frequency[drawn.tokens]).abs().max() < 1.1 / n + 1e-6
        assert (
            drawn.tokens.diff().min() >= 0
        )  # in the order of the vocabulary, whatever was sorted on the way
    assert drawn.sound.all()


def test_greedy_takes_the_most_probable_of_what_is_allowed():
    logits = torch.tensor([[1.0, 5.0, 4.0, 0.0], [1.0, 5.0, 4.0, 6.0]])
    generation = Generation(greedy=True, top_k=1, repetition_penalty=2.0, temperature=0.5)
    u = torch.tensor([0.0, 0.999], dtype=torch.float64)
    drawn = sample(logits, u, generation, 0, {3: 1}, torch.tensor([[1], [2]]))
    assert drawn.tokens.tolist() == [2, 1]  # 5 is halved in the first row, 6 forbidden in the second
    assert drawn.kept is None
    scores = torch.tensor([[2.0, 5.0, 8.0], [2.0, 10.0, 4.0]])
    expected = scores.log_softmax(1).gather(1, torch.tensor([[2], [1]]))[:, 0]
    assert torch.allclose(drawn.logprobs, expected, atol=1e-6)


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


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"greedy": True}], ids=str
)
def test_what_is_no_distribution_is_told(bad, settings):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    logits[2] = -torch.inf
    drawn = sample(logits, torch.full((3,), 0.9, dtype=torch.float64), Generation(**settings), 5, {})
    assert drawn.sound.tolist() == [True, False, False]
    assert ((drawn.tokens >= 0) & (drawn.tokens < 4)).all()  # nothing is looked up outside the vocabulary


def test_when_a_support_is_recorded():
    assert not records(Generation(temperature=0.7, min_new_tokens=3, repetition_penalty=1.3))
    for settings in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert records(Generation(**settings))
        assert restricts(Generation(logprob_mode="raw", **settings))
        assert not records(Generation(logprob_mode="raw", **settings))
        assert not records(Generation(greedy=True, **settings))
