"""The three kinds of record that stages read, their ids, and the split that an id belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

SPLITS = ("train", "validation", "heldout")
# what the authors of HC3 put after every reddit_eli5 question, in two wordings
ELI5 = re.compile(r"\s*\b(Please explain|Explain) like I'm five\.?\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt with what was said before it: `history` is earlier exchanges, each a prompt and its response."""

    prompt: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""

    def __str__(self) -> str:
        """For people to read; what a model reads is made by the template."""
        said = [
            line for exchange in self.history for line in zip(("Human", "Assistant"), exchange, strict=True)
        ]
        lines = [("System", self.system)] * bool(self.system) + said + [("Human", self.prompt)]
        return "\n\n".join(f"{who}: {text}" for who, text in lines)


Asked = str | Dialogue  # a single prompt is plain text; a dialogue is one only where there is more to it


def asked(prompt: str, history: Sequence[tuple[str, str]] = (), system: str = "") -> Asked:
    """The prompt alone, or a Dialogue where something was said before it."""
    return Dialogue(prompt, tuple(history), system) if history or system else prompt


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and an answer to imitate."""

    id: int
    prompt: Asked
    response: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and two answers, of which `chosen` was preferred.

    margin: how clearly, as far as the data says; source: where the comparison comes from, "" where it does not say.
    """

    id: int
    prompt: Asked
    chosen: str
    rejected: str
    margin: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer; `reference` is the answer that the data holds for good, where it has one."""

    id: int
    prompt: Asked
    reference: str | None


Record = Demonstration | Comparison | Prompt


class BadRow(Exception):
    """A row that cannot be read; the message says why (`dataset.on_bad_row` decides what follows)."""


class Drop(Exception):
    """A sound row that the dataset's published recipe leaves out; it is counted under the message.

    Raised for a whole row; in a list of records it stands for the part of the row that is left out.
    """


def prompt_id(prompt: Asked) -> int:
    """The prompt's identity in every view and family: 8 bytes of its sha256 without the sign bit (int63)."""
    return int.from_bytes(sha256(str(prompt).encode()).digest()[:8], "big") & (2**63 - 1)


def opening_id(prompt: Asked) -> int:
    """The id that decides the split: of the first prompt of a dialogue, whatever its whitespace.

    Published sets hold a dialogue once for each of its turns: its beginnings must not be trained on where its
    end is evaluated. What HC3 appends to questions, and dataset.hc3.strip_eli5 takes off, does not count either.
    """
    first = prompt if isinstance(prompt, str) else prompt.history[0][0] if prompt.history else prompt.prompt
    return prompt_id(ELI5.sub("", " ".join(first.split())))


def half_of(id: int) -> str:
    """first or second, from an id alone and whatever its split: of prompts that no other model may train on."""
    return "second" if sha256(f"half:{id}".encode()).digest()[0] & 128 else "first"


def split_of(id: int, validation_share: float, heldout_share: float) -> str:
    """The split of a prompt, from its id alone.

    The id is hashed once more, so that whatever else orders by id (`dataset.limit`) is independent of the
    split. Held-out prompts come first in [0, 1): changing validation_share never moves a held-out prompt.
    """
    u = int.from_bytes(sha256(f"split:{id}".encode()).digest()[:8], "big") / 2**64
    if u < heldout_share:
        return "heldout"
    return "validation" if u < heldout_share + validation_share else "train"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def text(row: Mapping[str, Any], name: str) -> str:
    """Field `name` of a row, stripped of whitespace. Raises BadRow if it is absent, no text, or empty."""
    value = string(row, name)
    if not value:
        raise BadRow(f"field '{name}' is empty")
    return value


def string(row: Mapping[str, Any], name: str) -> str:
    """As `text`, but it may be empty."""
    if name not in row:
        raise BadRow(f"no field '{name}' (has: {_shown(row)})")
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"field '{name}' must be text, is {kind(value)}")
    value = value.strip()
    if not encodable(value):
        raise BadRow(f"field '{name}' holds half a character (a lone surrogate)")
    return value


def number(row: Mapping[str, Any], name: str) -> float:
    """Field `name` of a row, a finite number. Raises BadRow if it is absent or none."""
    if name not in row:
        raise BadRow(f"no field '{name}' (has: {_shown(row)})")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"field '{name}' must be a finite number, is {kind(value)}")
    return float(value)


def encodable(value: str) -> bool:
    """JSON can spell half of a UTF-16 pair, a text that neither a hash nor a tokenizer can take."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(row: Mapping[str, Any], most: int = 8) -> str:
    """The field names of a row on one printable line."""
    names = [name if name.isidentifier() and name.isascii() else ascii(name)[:40] for name in map(str, row)]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"
