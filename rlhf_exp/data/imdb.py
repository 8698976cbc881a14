"""Family `imdb`: film reviews (Maas et al. 2011) to be continued, demonstrations and prompts.

Row: {"text": .., "label": 0 | 1} (the label is not read and may be absent). The first `dataset.prompt_words`
words are the prompt, by default four as in trlX (CarperAI/trlx, examples/ppo_sentiments.py), the rest is the
answer. A text without a rest worth the name is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.records import Demonstration, Drop, Prompt, prompt_id, text
from rlhf_exp.schema import Dataset

FEWEST_WORDS = 4  # of the rest: fewer are the end of a phrase and no answer
BREAKS = re.compile(r"\s*(<br\s*/?>\s*)+", re.IGNORECASE)


def opening_and_rest(value: str, words: int) -> tuple[str, str]:
    """The first words, with single spaces between, and the rest as it is. Raises Drop where it is too short."""
    parts = value.split(maxsplit=words)
    rest = parts.pop().strip() if len(parts) > words else ""
    if len(rest.split()) < FEWEST_WORDS:
        raise Drop("too short")
    return " ".join(parts), rest


def demonstrations(row: Mapping[str, Any], dataset: Dataset, field: str = "text") -> list[Demonstration]:
    opening, rest = opening_and_rest(BREAKS.sub(" ", text(row, field)).strip(), dataset.prompt_words)
    return [Demonstration(prompt_id(opening), opening, rest)]


def prompts(row: Mapping[str, Any], dataset: Dataset, field: str = "text") -> list[Prompt]:
    """The opening; how its author went on is one way of many, so no reference."""
    return [Prompt(d.id, d.prompt, None) for d in demonstrations(row, dataset, field)]


VIEWS = {"demonstrations": demonstrations, "prompts": prompts}
