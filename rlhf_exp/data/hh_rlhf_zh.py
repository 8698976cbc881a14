"""Family `hh_rlhf_zh`: hh-rlhf translated to Chinese (dikw/hh_rlhf_cn), turns as objects, all three views.

Row: {"context": [{"role": "human" | "assistant", "text": ..}, ..], "chosen": {"role": "assistant", "text": ..},
"rejected": {..}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import Turn, comparison, demonstration, prompt_of, turn, turns
from rlhf_exp.data.records import Comparison, Demonstration, Prompt, text
from rlhf_exp.schema import Dataset


def _dialogue(row: Mapping[str, Any], answer: str) -> list[Turn]:
    context = turns(row, "context", "role", "text")
    if answer not in row:
        text(row, answer)  # says so
    return [*context, turn(row[answer], "role", "text")]


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    return demonstration(_dialogue(row, "chosen"))


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    return comparison(_dialogue(row, "chosen"), _dialogue(row, "rejected"), dataset)


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    return prompt_of(_dialogue(row, "chosen"))


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
