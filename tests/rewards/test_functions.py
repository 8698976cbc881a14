"""Rules that score a response."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from rlhf_exp import schema
from rlhf_exp.errors import InputError
from rlhf_exp.rewards import functions


@pytest.mark.parametrize(
    ("text", "compound"),
    [  # published in VADER's own README
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("Today SUX!", -0.5461),
    ],
)
def test_sentiment_gives_the_published_scores(text, compound):
    assert functions.score("sentiment", ["p"], [text]) == [compound]


def test_sentiment_of_nothing_is_zero_and_the_prompt_does_not_count():
    assert (
        functions.score("sentiment", ["great, great"] * 4, ["", " \n", "the table", "汤很好喝"]) == [0.0] * 4
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("  \n ", 0),
        ("one", 1),
        ("it's two\twords ...", 3),
        ("- — !", 0),
        ("a 3-D film", 3),
        ("汤很好喝。", 4),
    ],
)
def test_length_counts_words(text, words):
    assert functions.score("length", ["p"], [text]) == [words]


def test_mixed_scripts_are_counted_by_their_own_rule():
    assert functions.score("length", ["p"] * 2, ["我用 PyTorch训练", "PyTorch训练"]) == [5, 3]


def test_a_score_for_each_response_in_order():
    assert functions.score("length", ["p"] * 3, ["a b c", "a", "a b"]) == [3, 1, 2]
    assert functions.score("length", [], []) == []


def test_unknown_rule_names_the_choices():
    with pytest.raises(
        InputError, match="unknown reward function 'sentimnt'; choose one of sentiment, length"
    ):
        functions.score("sentimnt", ["p"], ["r"])


def test_prompts_and_responses_must_pair():
    with pytest.raises(ValueError, match="2 prompts, but 1 responses"):
        functions.score("length", ["p", "q"], ["r"])


def test_the_schema_offers_exactly_these_rules():
    def choices(node, name):
        return next(set(f.metadata["choices"]) for f in fields(node) if f.name == name)

    assert choices(schema.RewardSource, "function") == set(functions.FUNCTIONS)
    assert choices(schema.Evaluation, "gold") == {*functions.FUNCTIONS, "none"}


def test_importing_the_table_loads_no_analyser():
    code = "import sys, rlhf_exp.rewards.functions; print('vaderSentiment' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
