"""Family `jsonl`: any file of rows; `dataset.fields` says which field is what, dots lead into objects.

    dataset=jsonl dataset.views.demonstrations=rows.jsonl dataset.fields.prompt=info.question

All three views. An empty text is a bad row here: of a file that nobody published only its owner knows more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import HUMAN, Turn, exchanges, opening, optional
from rlhf_exp.data.records import Asked, Comparison, Demonstration, Drop, Prompt, number, prompt_id, text
from rlhf_exp.schema import Dataset


def _found(row: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """{path: the value there}, for whatever reads fields; the whole row where there is none, to be complained of."""
    value: Any = row
    for name in [path] if path in row else path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return row
        value = value[name]
    return {path: value}


def _prompt(row: Mapping[str, Any], dataset: Dataset) -> Asked:
    fields = dataset.fields
    prompt = text(_found(row, fields.prompt), fields.prompt)
    system = optional(_found(row, fields.system), fields.system) if fields.system else ""
    history = exchanges(_found(row, fields.history), fields.history) if fields.history else []
    return opening([*history, Turn(HUMAN, prompt)], system)


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    prompt, name = _prompt(row, dataset), dataset.fields.response
    return [Demonstration(prompt_id(prompt), prompt, text(_found(row, name), name))]


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    prompt, fields = _prompt(row, dataset), dataset.fields
    chosen, rejected = (text(_found(row, name), name) for name in (fields.chosen, fields.rejected))
    if chosen == rejected:
        raise Drop("equal answers")
    margin = number(_found(row, fields.margin), fields.margin) if fields.margin else None
    source = optional(_found(row, fields.source), fields.source) if fields.source else ""
    return [Comparison(prompt_id(prompt), prompt, chosen, rejected, margin, source)]


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    prompt, name = _prompt(row, dataset), dataset.fields.reference
    reference = optional(_found(row, name), name) if name else ""
    return [Prompt(prompt_id(prompt), prompt, reference or None)]


VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
