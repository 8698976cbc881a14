"""Comparisons of stage=prefer: what is written comes back as it was, on the same side of every split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_exp.data import labels
from rlhf_exp.data.load import fingerprint, load_view, statistics
from rlhf_exp.data.records import Dialogue, prompt_id
from rlhf_exp.schema import Dataset, Views

PROMPTS = [
    "What is a tram?",
    'Two\nlines, \u2028 and a quote "',
    "Explain the sea. Please explain like I'm five.",
    Dialogue("And then?", (("Who came?", "Nobody."), ("Really?", "Yes."))),
    Dialogue("Hello", (), "Be brief."),
    Dialogue("Go on", (("Start", "Done"),), "Rhyme."),
]


def dataset(path: Path, **values) -> Dataset:
    """The reviews, with comparisons of stage=prefer."""
    views = Views("builtin:reviews", str(path), "builtin:reviews")
    return Dataset(name="reviews", family="reviews", views=views, comparisons_from="prefer", **values)


def write(path: Path, rows) -> Path:
    path.write_text(labels.text_of(rows), encoding="utf-8")
    return path


def test_a_row_by_hand():
    row = labels.row(PROMPTS[5], "good", "bad", 0.5, "sft + ppo", "length")
    assert json.loads(labels.text_of([row])) == {
        "prompt": "Go on",
        "history": [["Start", "Done"]],
        "system": "Rhyme.",
        "chosen": "good",
        "rejected": "bad",
        "margin": 0.5,
        "source": "sft + ppo",
        "labeller": "length",
    }
    assert set(labels.row("Hi", "a", "b", 1, "sft", "judge")) == {
        *("prompt", "chosen", "rejected", "margin", "source", "labeller")
    }


def test_prompts_come_back_as_they_were_whatever_the_family_of_the_data(tmp_path):
    rows = [labels.row(prompt, "yes", "no", 1.5, "sft", "length") for prompt in PROMPTS]
    path = write(tmp_path / "comparisons.jsonl", rows)
    found = load_view(dataset(path, validation_share=0, heldout_share=0), "comparisons", "train")
    assert [record.prompt for record in found] == PROMPTS
    assert [record.id for record in found] == [prompt_id(prompt) for prompt in PROMPTS]
    assert {(r.chosen, r.rejected, r.margin, r.source) for r in found} == {("yes", "no", 1.5, "sft")}
    assert labels.read(path) == rows


def test_the_other_views_are_the_datas_own(tmp_path):
    path = write(tmp_path / "comparisons.jsonl", [labels.row("Hi", "a", "b", 1, "sft", "length")])
    with_labels = dataset(path)
    own = replace(with_labels, comparisons_from="data", views=Views(*["builtin:reviews"] * 3))
    for view in ("prompts", "demonstrations"):
        assert load_view(with_labels, view, "train") == load_view(own, view, "train")
        assert fingerprint(with_labels, view) == fingerprint(own, view)
    assert fingerprint(with_labels, "comparisons") != fingerprint(own, "comparisons")


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.3, 0.2)])
def test_a_comparison_is_in_the_split_of_its_prompt(tmp_path, shares):
    values = dict(zip(("validation_share", "heldout_share"), shares, strict=True))
    own = Dataset(name="reviews", family="reviews", views=Views(*["builtin:reviews"] * 3), **values)
    asked = {split: load_view(own, "prompts", split) for split in ("train", "validation")}
    rows = [labels.row(p.prompt, "a", "b", 1, "sft", "length") for each in asked.values() for p in each]
    labelled = dataset(write(tmp_path / "comparisons.jsonl", rows), **values)
    for split, prompts in asked.items():
        assert {r.prompt for r in load_view(labelled, "comparisons", split)} == {p.prompt for p in prompts}
    assert statistics(labelled, "comparisons").records["heldout"] == 0


def test_the_same_answers_either_way_round_are_one_pair():
    one, other = (labels.row("Hi", *pair, 1, "sft", "x") for pair in (("a", "b"), ("b", "a")))
    assert labels.identity(one) == labels.identity(other)
    assert labels.identity(one) != labels.identity(one | {"prompt": "Ho"})
    assert labels.identity(one) != labels.identity(one | {"history": [["x", "y"]]})
