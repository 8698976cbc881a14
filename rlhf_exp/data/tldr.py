"""Family `tldr`: Reddit posts and summaries (Stiennon et al. 2020) in the CarperAI schemas.

- CarperAI/openai_summarize_tldr: demonstrations and prompts (the label is the reference),
  {"prompt": "SUBREDDIT: ..\\nTITLE: ..\\nPOST: ..\\nTL;DR:", "label": " summary"}.
- CarperAI/openai_summarize_comparisons: comparisons,
  {"prompt": the same without "TL;DR:", "chosen": "TL;DR: ..", "rejected": "TL;DR: .."}.

Records of both files have the first one's form: every prompt ends in "TL;DR:" and no summary starts with
it, so that a post has one id, and one split, in all views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.records import BadRow, Comparison, Demonstration, Drop, Prompt, prompt_id, text
from rlhf_exp.schema import Dataset

MARK = "TL;DR:"
FEWEST_WORDS = 5


def _prompt(row: Mapping[str, Any]) -> str:
    fields = text(row, "prompt").removesuffix(MARK).rstrip()
    if not fields:
        raise BadRow(f"field 'prompt' is empty before '{MARK}'")
    return f"{fields}\n{MARK}"


def _summary(row: Mapping[str, Any], name: str) -> str:
    summary = text(row, name).removeprefix(MARK).lstrip()
    if not summary:
        raise BadRow(f"field '{name}' is empty after '{MARK}'")
    return summary


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    prompt = _prompt(row)
    return [Demonstration(prompt_id(prompt), prompt, _summary(row, "label"))]


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    """Equal and very short summaries are left out as in trlX's reward recipe.

    (CarperAI/trlx, examples/summarize_rlhf/reward_model/train_reward_model_gptj.py: either field under 5
    words, where the "TL;DR:" in front counts as a word.)
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if chosen == rejected:
        raise Drop("equal answers")
    if min(len(chosen.split()), len(rejected.split())) < FEWEST_WORDS:
        raise Drop(f"under {FEWEST_WORDS} words")
    prompt = _prompt(row)
    return [Comparison(prompt_id(prompt), prompt, _summary(row, "chosen"), _summary(row, "rejected"))]


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    prompt = _prompt(row)
    return [Prompt(prompt_id(prompt), prompt, _summary(row, "label"))]


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
