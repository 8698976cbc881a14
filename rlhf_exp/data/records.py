"""The three kinds of record that stages read, their ids, and the split that an id belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and an answer to imitate."""

    id: int
    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prompt and two answers, of which `chosen` was preferred."""

    id: int
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer; `reference` is a human answer where the data has one."""

    id: int
    prompt: str
    reference: str | None


Record = Demonstration | Comparison | Prompt


class BadRow(Exception):
    """A row that cannot be read; the message says why (`dataset.on_bad_row` decides what follows)."""


class Drop(Exception):
    """A sound row that the dataset's published recipe leaves out; it is counted under the message."""


def prompt_id(prompt: str) -> int:
    """The prompt's identity in every view and family: 8 bytes of its sha256 without the sign bit (int63)."""
    return int.from_bytes(sha256(prompt.encode()).digest()[:8], "big") & (2**63 - 1)


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
    if name not in row:
        raise BadRow(f"no field '{name}' (has: {_shown(row)})")
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"field '{name}' must be text, is {kind(value)}")
    value = value.strip()
    if not value:
        raise BadRow(f"field '{name}' is empty")
    if not encodable(value):
        raise BadRow(f"field '{name}' holds half a character (a lone surrogate)")
    return value


def encodable(value: str) -> bool:
    """JSON can spell half of a UTF-16 pair, a text that neither a hash nor a tokenizer can take."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(row: Mapping[str, Any], most: int = 8) -> str:
    """The field names of a row on one printable line."""
    names = [name if name.isidentifier() and name.isascii() else ascii(name)[:40] for name in map(str, row)]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"
