"""The loaders on real rows in the published schemas (a folder outside the repository, see conftest.py)."""

from __future__ import annotations

import pytest

from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.data.records import SPLITS
from rlhf_exp.data.templates import Cuts, encode_prompts
from rlhf_exp.schema import Views


@pytest.fixture
def tldr(real_data, dataset, monkeypatch):
    """The hub ids of the shipped config, found below RLHF_EXP_DATA."""
    monkeypatch.setenv("RLHF_EXP_DATA", str(real_data))
    posts, pairs = "CarperAI/openai_summarize_tldr", "CarperAI/openai_summarize_comparisons"
    return dataset("tldr", Views(posts, pairs, posts), validation_share=0.1, heldout_share=0.1)


def test_tldr_rows(tldr):
    # row counts and the share of longer chosen answers are those of the folder's README
    posts, pairs = statistics(tldr, "prompts"), statistics(tldr, "comparisons")
    assert posts.rows == 1368 and sum(posts.records.values()) + sum(posts.dropped.values()) == 1368
    assert pairs.rows == 690 and sum(pairs.records.values()) + sum(pairs.dropped.values()) == 690
    assert pairs.longer_chosen == pytest.approx(0.68, abs=0.01)
    assert statistics(tldr, "demonstrations").rows == 1368


def test_no_post_is_trained_on_in_one_view_and_evaluated_on_in_another(tldr):
    views = ("demonstrations", "comparisons")
    ids = {split: [{r.id for r in load_view(tldr, view, split)} for view in views] for split in SPLITS}
    for demonstrations, comparisons in ids.values():
        assert comparisons <= demonstrations  # the pairs are of the same posts
    assert not set.union(*ids["train"]) & set.union(*ids["validation"], *ids["heldout"])


def test_posts_keep_their_title_and_end_when_cut(tldr, tokenizer):
    cuts = Cuts()
    tldr.max_prompt_tokens = 800  # bytes
    prompts = [p.prompt for p in load_view(tldr, "prompts", "train")][:200]
    assert all(p.startswith("SUBREDDIT: r/") and p.endswith("\nTL;DR:") for p in prompts)
    for prompt, ids in zip(prompts, encode_prompts(tokenizer, tldr, prompts, cuts), strict=True):
        text = tokenizer.decode(ids)
        assert len(ids) <= 800 and text.endswith("\nTL;DR:")
        assert text.startswith(prompt.split("\nPOST:", 1)[0])
        assert prompt.startswith(text.removesuffix("\nTL;DR:"))
    assert 50 < cuts.prompts_cut < 200
