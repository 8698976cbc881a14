"""Family `hh_rlhf`: Anthropic/hh-rlhf (Bai et al. 2022), two whole dialogues a row, all three views.

Row: {"chosen": "\\n\\nHuman: ..\\n\\nAssistant: ..", "rejected": the same with another end}. Demonstrations are the
last answers of the chosen dialogues, prompts what these answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import comparison, demonstration, marked, prompt_of
from rlhf_exp.data.records import Comparison, Demonstration, Prompt
from rlhf_exp.schema import Dataset


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    return demonstration(marked(row, "chosen"))


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    return comparison(marked(row, "chosen"), marked(row, "rejected"), dataset)


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    return prompt_of(marked(row, "chosen"))


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
