"""Family `rlhf_reward`: prompt, chosen, rejected, with marks or plain, all three views.

- yitingxie/rlhf-reward-datasets: {"prompt": "Human: ..\\n\\nAssistant: ..\\n\\nHuman: ..\\n\\n",
  "chosen": "Assistant: ..", "rejected": "Assistant: .."}; the prompt may hold several rounds.
- beyond/rlhf-reward-single-round-trans_chinese: the three as plain texts.

A prompt that begins with "Human:" or "Assistant:" has marks; then they are taken off its answers too. That
the answers follow "Assistant:" is for the template to say (human_assistant does).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import (
    ASSISTANT,
    HUMAN,
    MARK,
    Turn,
    comparison,
    demonstration,
    marked,
    prompt_of,
)
from rlhf_exp.data.records import Comparison, Demonstration, Prompt, string, text
from rlhf_exp.schema import Dataset


def _dialogue(row: Mapping[str, Any], answer: str) -> list[Turn]:
    prompt, said = text(row, "prompt"), string(row, answer)
    if not MARK.match(prompt):
        return [Turn(HUMAN, prompt), Turn(ASSISTANT, said)]
    turns = marked(row, "prompt")
    if turns[-1] == Turn(ASSISTANT, ""):  # DeepSpeed-Chat's own form of a prompt ends so
        turns.pop()
    return [*turns, Turn(ASSISTANT, said.removeprefix("Assistant:").lstrip())]


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    return demonstration(_dialogue(row, "chosen"))


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    return comparison(_dialogue(row, "chosen"), _dialogue(row, "rejected"), dataset)


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    return prompt_of(_dialogue(row, "chosen"))


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
