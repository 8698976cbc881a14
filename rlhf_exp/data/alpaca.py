"""Family `alpaca`: instructions and answers (Taori et al. 2023), demonstrations and prompts.

Row: {"instruction": .., "input": .., "output": ..}, optionally "system": .. and "history": [[prompt, response], ..].
As in LLaMA-Factory (data/README.md) the prompt is instruction + "\\n" + input where there is an input. Some of
the published outputs are empty: such rows are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import (
    ASSISTANT,
    HUMAN,
    Turn,
    demonstration,
    exchanges,
    optional,
    prompt_of,
)
from rlhf_exp.data.records import Demonstration, Prompt, string, text
from rlhf_exp.schema import Dataset


def _dialogue(row: Mapping[str, Any]) -> tuple[list[Turn], str]:
    """The turns with the answer at the end, and the system message."""
    prompt = "\n".join(filter(None, (text(row, "instruction"), optional(row, "input"))))
    history = exchanges(row, "history")
    answer = Turn(ASSISTANT, string(row, "output"))
    return [*history, Turn(HUMAN, prompt), answer], optional(row, "system")


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    return demonstration(*_dialogue(row))


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    """The reference is the row's output."""
    return prompt_of(*_dialogue(row))


VIEWS = {"demonstrations": demonstrations, "prompts": prompts}
