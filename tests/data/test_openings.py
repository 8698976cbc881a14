"""Families imdb and sst2: the first words are the prompt."""

from __future__ import annotations

import pytest

from rlhf_exp.data.load import load_view, statistics

REVIEW = " One  of the\nother reviewers said.<br /><br />Then he left , BR/> and came back. "


@pytest.mark.parametrize(
    ("words", "prompt", "rest"),
    [
        (4, "One of the other", "reviewers said. Then he left , BR/> and came back."),
        (1, "One", "of the\nother reviewers said. Then he left , BR/> and came back."),
        (10, "One of the other reviewers said. Then he left ,", "BR/> and came back."),
    ],
)
def test_imdb(write, dataset, words, prompt, rest):
    data = dataset("imdb", write("rows.jsonl", [{"text": REVIEW, "label": 1}]), prompt_words=words)
    (demonstration,) = load_view(data, "demonstrations", "train")
    assert (demonstration.prompt, demonstration.response) == (prompt, rest)
    (asked,) = load_view(data, "prompts", "train")
    assert (asked.id, asked.prompt, asked.reference) == (demonstration.id, prompt, None)


def test_sst2_leaves_out_phrases(write, dataset):
    sentences = ["a b c d e f g h", "a b c d e f g", "a b c d i j k l", "m"]
    rows = [{"sentence": sentence, "label": 0, "idx": i} for i, sentence in enumerate(sentences)]
    data = dataset("sst2", write("rows.jsonl", rows))
    assert [d.response for d in load_view(data, "demonstrations", "train")] == ["e f g h", "i j k l"]
    assert statistics(data, "demonstrations").dropped == {"too short": 2}
    assert [p.prompt for p in load_view(data, "prompts", "train")] == ["a b c d"]
    assert statistics(data, "prompts").dropped == {"too short": 2, "duplicate": 1}
