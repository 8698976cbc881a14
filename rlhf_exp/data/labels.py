"""The comparisons that stage=prefer writes: rows of family jsonl, whatever family the prompts are of.

    {"prompt": .., "chosen": .., "rejected": .., "margin": 0.7, "source": "sft", "labeller": "sentiment", "round": 1}

A dialogue's prompt also has "history" ([[prompt, response], ..]) and "system". With dataset.comparisons_from=prefer
the view `comparisons` is such a file: its path is in dataset.views.comparisons once the plan has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_exp.data.records import Asked, Dialogue
from rlhf_exp.schema import DATA, PREFER, Dataset, Fields

FILE = "comparisons.jsonl"
FIELDS = Fields(margin="margin", source="source", system="system", history="history")


def row(
    prompt: Asked, chosen: str, rejected: str, margin: float, source: str, labeller: str
) -> dict[str, Any]:
    """A comparison as the file has it."""
    return fields_of(prompt) | {
        "chosen": chosen,
        "rejected": rejected,
        "margin": margin,
        "source": source,
        "labeller": labeller,
    }


def fields_of(prompt: Asked) -> dict[str, Any]:
    """The fields of a row that say what was asked."""
    if not isinstance(prompt, Dialogue):
        return {"prompt": prompt}
    found = {"prompt": prompt.prompt, "history": [list(each) for each in prompt.history]}
    return found | ({"system": prompt.system} if prompt.system else {})


def text_of(rows: Iterable[dict[str, Any]]) -> str:
    """The file's content."""
    return "".join(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `text_of` made; split at line feeds only, which JSON keeps out of texts."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def identity(each: dict[str, Any]) -> str:
    """What two rows share that compare the same answers to the same prompt, whichever of them was chosen."""
    pair = sorted((each["chosen"], each["rejected"]))
    return json.dumps([each.get("system", ""), each.get("history", []), each["prompt"], *pair])


def read_as(dataset: Dataset, view: str) -> Dataset:
    """The dataset by whose rules a view is read: family jsonl for comparisons of stage=prefer, else itself."""
    if view != "comparisons" or dataset.comparisons_from != PREFER:
        return dataset
    return replace(dataset, family="jsonl", fields=FIELDS, comparisons_from=DATA)
