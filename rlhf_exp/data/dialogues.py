"""Turns of a conversation -> records: what the families of dialogues share.

A family reads its rows into turns; here turns become prompts (a Dialogue where something was said before),
demonstrations, and comparisons. Two dialogues that are compared are expected to differ in their last answer
only; `dataset.early_difference` says what becomes of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_exp.data.records import (
    Asked,
    BadRow,
    Comparison,
    Demonstration,
    Drop,
    Prompt,
    asked,
    kind,
    prompt_id,
    string,
    text,
)
from rlhf_exp.schema import Dataset

HUMAN, ASSISTANT, SYSTEM = "human", "assistant", "system"
ROLES = {"human": HUMAN, "user": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM}
# Anthropic/hh-rlhf and its relatives: a turn begins a paragraph with one of these
MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class Turn(NamedTuple):
    """Who said what; the text is stripped and may be empty."""

    role: str
    text: str


def marked(row: Mapping[str, Any], name: str) -> list[Turn]:
    """Turns of a field like "\\n\\nHuman: ..\\n\\nAssistant: ..". Raises BadRow where it starts otherwise."""
    before, *parts = MARK.split(text(row, name))
    if before:
        raise BadRow(f"field '{name}' must begin with 'Human:' or 'Assistant:'")
    return [
        Turn(role.lower(), said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]  # MARK has one group: what splits alternates with what was split


def turn(value: Any, role: str, said: str) -> Turn:
    """A turn of an object with fields `role` and `said`. Raises BadRow where it is none or nobody's."""
    if not isinstance(value, Mapping):
        raise BadRow(f"a turn must be an object with '{role}' and '{said}', is {kind(value)}")
    who = string(value, role)
    if who not in ROLES:
        raise BadRow(f"field '{role}' must be one of {', '.join(ROLES)}, is {who[:20]!a}")
    return Turn(ROLES[who], string(value, said))


def turns(row: Mapping[str, Any], name: str, role: str, said: str) -> list[Turn]:
    """The turns of a field that is a list of objects."""
    return [turn(value, role, said) for value in items(row, name)]


def items(row: Mapping[str, Any], name: str) -> list[Any]:
    """A field that is a list. Raises BadRow where it is none."""
    if name not in row:
        text(row, name)  # says so
    if not isinstance(row[name], list):
        raise BadRow(f"field '{name}' must be a list, is {kind(row[name])}")
    return row[name]


def optional(row: Mapping[str, Any], name: str) -> str:
    """A text that may be absent, null or empty."""
    return "" if row.get(name) is None else string(row, name)


def exchanges(row: Mapping[str, Any], name: str) -> list[Turn]:
    """Turns of a field [[prompt, response], ..] that may be absent or null."""
    found = []
    for pair in [] if row.get(name) is None else items(row, name):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"field '{name}' must hold pairs [prompt, response]")
        said = {f"{name} prompt": pair[0], f"{name} response": pair[1]}
        found += [Turn(who, string(said, part)) for who, part in zip((HUMAN, ASSISTANT), said, strict=True)]
    return found


def opening(said: Sequence[Turn], system: str = "") -> Asked:
    """The turns before an answer as a prompt. Raises Drop where they do not alternate or one is empty.

    What stands before the first human turn is nobody's answer: it is taken for the system message, which sets
    derived from others write so.
    """
    said = list(said)
    while said and said[0].role != HUMAN:
        system = "\n\n".join(filter(None, (system, said.pop(0).text)))
    if [t.role for t in said] != [(HUMAN, ASSISTANT)[i % 2] for i in range(len(said))] or len(said) % 2 == 0:
        raise Drop("turns do not alternate")
    if not all(t.text for t in said):
        raise Drop("empty turn")
    history = [(a.text, b.text) for a, b in zip(said[:-1:2], said[1::2], strict=True)]
    return asked(said[-1].text, history, system)


def demonstration(said: Sequence[Turn], system: str = "") -> list[Demonstration]:
    """The last answer, to imitate."""
    if not said or said[-1].role != ASSISTANT:
        raise Drop("no answer at the end")
    if not said[-1].text:
        raise Drop("empty answer")
    prompt = opening(said[:-1], system)
    return [Demonstration(prompt_id(prompt), prompt, said[-1].text)]


def prompt_of(said: Sequence[Turn], system: str = "") -> list[Prompt]:
    """What the last answer answers, with this answer (if it is one) as the reference."""
    answered = bool(said) and said[-1].role == ASSISTANT
    prompt = opening(said[:-1] if answered else said, system)
    return [Prompt(prompt_id(prompt), prompt, said[-1].text or None if answered else None)]


def comparison(
    chosen: Sequence[Turn], rejected: Sequence[Turn], dataset: Dataset, system: str = ""
) -> list[Comparison]:
    """The two answers in which the dialogues first differ. Raises Drop where they are not a fair pair.

    Where dialogues differ before their last turn, the rest answers different questions. early_difference=drop
    leaves them out; cut takes the answers in which they part, or leaves them out if a human turn differs.
    """
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if same == len(chosen) == len(rejected):
        raise Drop("equal answers")
    if not len(chosen) == len(rejected) == same + 1 and dataset.early_difference == "drop":
        raise Drop("differs before the last answer")
    if same == min(len(chosen), len(rejected)) or {chosen[same].role, rejected[same].role} != {ASSISTANT}:
        raise Drop("differs in a human turn")
    if not (chosen[same].text and rejected[same].text):
        raise Drop("empty answer")
    prompt = opening(chosen[:same], system)
    return [Comparison(prompt_id(prompt), prompt, chosen[same].text, rejected[same].text)]
