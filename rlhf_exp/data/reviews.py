"""Family `reviews`: openings of reviews with an upbeat and a downbeat continuation, shipped as reviews.jsonl.

Row: {"domain": "film" | "book" | "restaurant" | "product", "opening": .., "upbeat": .., "downbeat": ..}.
The opening is the prompt. All three views come from the one file (`builtin:reviews`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.records import Comparison, Demonstration, Drop, Prompt, prompt_id, text
from rlhf_exp.schema import Dataset


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    """Both continuations: SFT learns to write reviews of either kind, PPO then has something to shift."""
    opening = text(row, "opening")
    id = prompt_id(opening)
    return [
        Demonstration(id, opening, text(row, "upbeat")),
        Demonstration(id, opening, text(row, "downbeat")),
    ]


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    """The upbeat continuation is the chosen one."""
    opening, upbeat, downbeat = text(row, "opening"), text(row, "upbeat"), text(row, "downbeat")
    if upbeat == downbeat:
        raise Drop("equal answers")
    return [Comparison(prompt_id(opening), opening, upbeat, downbeat)]


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    """The opening; there is no single right continuation, so no reference."""
    opening = text(row, "opening")
    return [Prompt(prompt_id(opening), opening, None)]


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
