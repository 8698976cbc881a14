"""Rules that score a response from its text: no parameters, no training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

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


def regex(pattern: str, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for each response in which Python's `re` finds the pattern, else 0.

    Nothing bounds the time of a search: a pattern such as (a+)+$ takes exponentially long on some texts.
    """
    search = re.compile(pattern).search
    return [float(search(text) is not None) for text in responses]


@cache
def _vader() -> SentimentIntensityAnalyzer:
    """One analyser a process: reading the lexicon takes 30 ms."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
