"""Rules that score a response: no parameters, no training. They serve as rewards and as gold scorers.

A rule takes (prompts, responses) and returns a score for each response. To add one: write the function, name
it in FUNCTIONS, and among the choices of `reward_source.function` and `eval.gold` in schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from rlhf_exp.errors import InputError

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHER = rf"[^\s{_IDEOGRAPH}]*"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|{_OTHER}[^\W{_IDEOGRAPH}]{_OTHER}")


def sentiment(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """VADER's compound score of each response, -1 (negative) to 1 (positive); the prompt is not looked at.

    Hutto & Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
    Its lexicon is English: text without a word of it scores 0, as does an empty response.
    """
    analyser = _vader()
    return [analyser.polarity_scores(text)["compound"] if text.strip() else 0.0 for text in responses]


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Words in each response: what stands between spaces and holds a letter or digit.

    Chinese and Japanese have no spaces: there each character counts.
    """
    return [float(len(_WORD.findall(text))) for text in responses]


FUNCTIONS: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    "sentiment": sentiment,
    "length": length,
}


def score(name: str, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A score for each response by the rule `name`. Raises InputError for an unknown rule."""
    if name not in FUNCTIONS:
        raise InputError(f"unknown reward function {name!r}; choose one of {', '.join(FUNCTIONS)}")
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
    return FUNCTIONS[name](prompts, responses)


@cache
def _vader() -> SentimentIntensityAnalyzer:
    """One analyser a process: reading the lexicon takes 30 ms."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
