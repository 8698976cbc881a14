"""The shipped file: is it fit to learn a sentiment from, and nothing else (length, leaks, repetitions)?"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean

import pytest

import rlhf_exp.data
from rlhf_exp.data import reviews
from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.data.records import SPLITS, BadRow, Drop
from rlhf_exp.schema import Dataset, Template, Views

FILE = Path(rlhf_exp.data.__file__).with_name("reviews.jsonl")
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
OPENINGS = [row["opening"] for row in ROWS]
CONTINUATIONS = [row[side] for row in ROWS for side in ("upbeat", "downbeat")]
SHIPPED = Dataset(
    name="reviews",
    family="reviews",
    views=Views("builtin:reviews", "builtin:reviews", "builtin:reviews"),
    template=Template(name="plain"),
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def test_one_row_as_records():
    row = {"domain": "film", "opening": "The film", "upbeat": "is a joy.", "downbeat": "is a bore."}
    up, down = reviews.demonstrations(row, None)
    assert (up.prompt, up.response) == ("The film", "is a joy.")
    assert (down.prompt, down.response) == ("The film", "is a bore.")
    (pair,) = reviews.comparisons(row, None)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("The film", "is a joy.", "is a bore.")
    (prompt,) = reviews.prompts(row, None)
    assert (prompt.prompt, prompt.reference) == ("The film", None)
    assert up.id == down.id == pair.id == prompt.id
    with pytest.raises(Drop, match="equal answers"):
        reviews.comparisons(row | {"downbeat": "is a joy."}, None)
    with pytest.raises(BadRow, match="no field 'downbeat'"):
        reviews.demonstrations({"opening": "The film", "upbeat": "is a joy."}, None)


def test_shape():
    assert len(ROWS) >= 300
    assert {tuple(row) for row in ROWS} == {("domain", "opening", "upbeat", "downbeat")}
    domains = Counter(row["domain"] for row in ROWS)
    assert set(domains) == {"film", "book", "restaurant", "product"}
    assert min(domains.values()) >= 0.9 * max(domains.values())


def test_text_is_clean():
    for text in OPENINGS + CONTINUATIONS:
        assert text.isascii() and text.isprintable() and text == " ".join(text.split())
    assert all(opening[-1].isalnum() or opening[-1] == "," for opening in OPENINGS)  # to be continued
    assert all(continuation.endswith((".", "!")) for continuation in CONTINUATIONS)


def test_lengths_say_nothing_about_the_side():
    up = [len(row["upbeat"].split()) for row in ROWS]
    down = [len(row["downbeat"].split()) for row in ROWS]
    assert all(8 <= n <= 16 for n in up + down)
    assert abs(mean(up) - mean(down)) < 0.3
    for longer, other in ((up, down), (down, up)):
        assert 0.4 <= mean(a > b for a, b in zip(longer, other, strict=True)) <= 0.6
    assert 0.4 <= statistics(SHIPPED, "comparisons").longer_chosen <= 0.6


def test_nothing_occurs_twice():
    assert len(set(OPENINGS)) == len(ROWS)
    # none is upbeat in one row and downbeat in another either
    assert len({text.lower() for text in CONTINUATIONS}) == 2 * len(ROWS)


@pytest.mark.parametrize("texts", [OPENINGS, CONTINUATIONS], ids=["openings", "continuations"])
def test_no_near_duplicates(texts):
    """No two share their first six words, their last five, or more than half of all their words."""
    assert Counter(tuple(words(text)[:6]) for text in texts).most_common(1)[0][1] == 1
    assert Counter(tuple(words(text)[-5:]) for text in texts).most_common(1)[0][1] == 1
    bags = [frozenset(words(text)) for text in texts]
    assert not [(a, b) for a, b in combinations(bags, 2) if 2 * len(a & b) > len(a | b)]


def test_no_single_beginning_dominates():
    assert Counter(words(text)[0] for text in CONTINUATIONS).most_common(1)[0][1] < 0.1 * len(CONTINUATIONS)


@pytest.mark.parametrize(("side", "sign"), [("upbeat", 1), ("downbeat", -1)])
def test_a_sentiment_lexicon_agrees(side, sign):
    module = pytest.importorskip("vaderSentiment.vaderSentiment")
    vader = module.SentimentIntensityAnalyzer()
    assert mean(sign * vader.polarity_scores(row[side])["compound"] > 0 for row in ROWS) >= 0.9


def test_splits_are_disjoint_and_of_sensible_size():
    openings = {split: {p.prompt for p in load_view(SHIPPED, "prompts", split)} for split in SPLITS}
    assert sum(map(len, openings.values())) == len(ROWS) == len(set.union(*openings.values()))
    assert 0.75 < len(openings["train"]) / len(ROWS) < 0.85
    assert 0.06 < len(openings["validation"]) / len(ROWS) < 0.14
    assert 0.06 < len(openings["heldout"]) / len(ROWS) < 0.14
    texts = {}
    for split in SPLITS:
        pairs = load_view(SHIPPED, "comparisons", split)
        demonstrations = load_view(SHIPPED, "demonstrations", split)
        assert {p.prompt for p in pairs} == {d.prompt for d in demonstrations} == openings[split]
        assert len(demonstrations) == 2 * len(pairs) == 2 * len(openings[split])
        texts[split] = {text for p in pairs for text in (p.chosen, p.rejected)}
        assert texts[split] == {d.response for d in demonstrations}
    assert not any(texts[a] & texts[b] for a, b in combinations(SPLITS, 2))


def test_every_domain_is_in_every_split():
    domain = {row["opening"]: row["domain"] for row in ROWS}
    for split in SPLITS:
        assert len({domain[p.prompt] for p in load_view(SHIPPED, "prompts", split)}) == 4
