"""Family `tldr_openai`: Reddit posts and summaries (Stiennon et al. 2020) in OpenAI's own schemas.

- tldr_3_filtered/*.jsonl: demonstrations and prompts (the summary is the reference),
  {"id": "t3_..", "subreddit": .., "title": .., "post": .., "summary": ..}.
- comparisons/*.json: comparisons, {"info": {"id": .., "post": .., "title": .., "subreddit": ..},
  "summaries": [{"text": .., "policy": .., "note": ..}, {..}], "choice": 0 | 1, "worker": .., "batch": ..,
  "split": "train" | "valid1" | "valid2", "extra": {..}}.

Fields are joined as by OpenAI (openai/summarize-from-feedback): blank lines between, "TL;DR:" at the end.
`split` and `batch` are not looked at: the splits of a run are cut by the hash of the prompt, all rows that
are given are read. The batches of CNN/DM articles are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import items, optional
from rlhf_exp.data.records import (
    BadRow,
    Comparison,
    Demonstration,
    Drop,
    Prompt,
    kind,
    prompt_id,
    string,
    text,
)
from rlhf_exp.data.tldr import FEWEST_WORDS
from rlhf_exp.schema import Dataset


def _prompt(fields: Mapping[str, Any]) -> str:
    subreddit, title, post = string(fields, "subreddit"), string(fields, "title"), text(fields, "post")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"field '{name}' must be an object, is {kind(value)}")
    return value


def _summaries(row: Mapping[str, Any]) -> tuple[str, str]:
    """The chosen summary and the other one."""
    both = [string(_object(value, "summaries"), "text") for value in items(row, "summaries")]
    choice = row.get("choice")
    if len(both) != 2 or type(choice) is not int or choice not in (0, 1):
        raise BadRow("there must be two 'summaries', and 'choice' must be 0 or 1")
    return both[choice], both[1 - choice]


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    prompt = _prompt(row)
    return [Demonstration(prompt_id(prompt), prompt, text(row, "summary"))]


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    """Equal and very short summaries are left out by the rule of family `tldr`, "TL;DR:" being a word of it.

    The source is who wrote the two, such as "ref / sup2".
    """
    if "info" not in row:
        text(row, "info")  # says so
    info = _object(row["info"], "info")
    if info.get("article") and not info.get("post"):
        raise Drop("a news article")
    prompt = _prompt(info)
    chosen, rejected = _summaries(row)
    if chosen == rejected:
        raise Drop("equal answers")
    if 1 + min(len(chosen.split()), len(rejected.split())) < FEWEST_WORDS:
        raise Drop(f"under {FEWEST_WORDS} words")
    policies = sorted({optional(summary, "policy") for summary in row["summaries"]} - {""})
    return [Comparison(prompt_id(prompt), prompt, chosen, rejected, source=" / ".join(policies))]


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    prompt = _prompt(row)
    return [Prompt(prompt_id(prompt), prompt, text(row, "summary"))]


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
