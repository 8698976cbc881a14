"""Family `sharegpt_preference`: a conversation and two answers, as LLaMA-Factory and MedicalGPT write it.

Row: {"conversations": [{"from": "human" | "gpt" | "system", "value": ..}, ..], "chosen": .., "rejected": ..}
and optionally "system": ... The answers are {"from": "gpt", "value": ..} (LLaMA-Factory, data/README.md) or
plain texts (MedicalGPT). A system turn at the beginning counts before the field, as in LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import (
    ASSISTANT,
    SYSTEM,
    Turn,
    comparison,
    demonstration,
    optional,
    prompt_of,
    turn,
    turns,
)
from rlhf_exp.data.records import Comparison, Demonstration, Prompt, string
from rlhf_exp.schema import Dataset


def _conversation(row: Mapping[str, Any]) -> tuple[list[Turn], str]:
    """The turns before the answers, without the system turn, and the system message."""
    said, system = turns(row, "conversations", "from", "value"), optional(row, "system")
    if said and said[0].role == SYSTEM:
        return said[1:], said[0].text
    return said, system


def _answer(row: Mapping[str, Any], name: str) -> Turn:
    if isinstance(row.get(name), Mapping):
        return turn(row[name], "from", "value")
    return Turn(ASSISTANT, string(row, name))


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    said, system = _conversation(row)
    return demonstration([*said, _answer(row, "chosen")], system)


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    said, system = _conversation(row)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    return comparison([*said, chosen], [*said, rejected], dataset, system)


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    said, system = _conversation(row)
    return prompt_of([*said, _answer(row, "chosen")], system)


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
