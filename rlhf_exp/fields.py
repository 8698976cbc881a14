"""What a configuration key is: a dataclass field with its documentation, bounds and part in the store key.

`schema` declares every key with these; the functions below walk a config made of such fields. Standard
library only: this is on the path of `--help` and `--cfg job`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import Field, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

MISSING = "???"  # omegaconf.MISSING, without the import: the help page comes before it could be read

BOUNDS = {
    "ge": ("must be at least", lambda value, bound: value >= bound),
    "gt": ("must be more than", lambda value, bound: value > bound),
    "le": ("must be at most", lambda value, bound: value <= bound),
    "lt": ("must be less than", lambda value, bound: value < bound),
}
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list[str]": "a list such as [a,b]",
    "list[float]": "a list of numbers such as [0.5,1]",
    "Any": "text or a list such as [a,b]",
    "dict[str, Any]": "settings such as {train: {steps: 10}}",
}


def leaf(
    default: Any = MISSING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
    keyed: bool = True,
) -> Any:
    """A field with its documentation and bounds. `keyed`: it can change a result and is in the store key."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices}
    metadata = {
        "doc": doc,
        "keyed": keyed,
        **{name: bound for name, bound in bounds.items() if bound is not None},
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type, *, doc: str, keyed: bool = True) -> Any:
    """A nested section. `keyed=False` takes all of it out of the store key."""
    return field(default_factory=cls, metadata={"doc": doc, "keyed": keyed})


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Yield (dotted key, field, value) for every section and leaf, in order of declaration."""
    for f in fields(config):
        value = getattr(config, f.name)
        yield f"{prefix}{f.name}", f, value
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")


def leaves(config: Any) -> Iterator[tuple[str, Field, Any]]:
    """Yield (dotted key, field, value) for every leaf, in order of declaration."""
    return ((key, f, value) for key, f, value in walk(config) if not is_dataclass(value))


def undeclared(config: Any, prefix: str = "") -> Iterator[str]:
    """Attributes that are no field: `+ppo.foo=1` passes OmegaConf's struct check and lands as one."""
    declared = {f.name for f in fields(config)}
    for name, value in vars(config).items():
        if name not in declared:
            yield f"{prefix}{name}"
        elif is_dataclass(value):
            yield from undeclared(value, f"{prefix}{name}.")


def type_text(f: Field) -> str:
    """The type of a leaf in words: `a whole number`, `text or null`."""
    plain = f.type.removesuffix(" | None")
    return TYPES[plain] + (" or null" if plain != f.type else "")


def range_text(f: Field) -> str:
    """The bounds of a leaf as `>= 0, < 1` or `a | b`; empty when there are none."""
    if "choices" in f.metadata:
        return " | ".join(f.metadata["choices"])
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(f"{sign} {f.metadata[name]}" for name, sign in signs.items() if name in f.metadata)


def value_problem(key: str, f: Field, value: Any) -> str | None:
    """What is wrong with a leaf in one line: no value, not finite, or out of its bounds; None if nothing."""
    if value == MISSING:
        return f"{key} has no value: {f.metadata['doc']}"
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{key} must be a finite number, got {value}"
    for name, (words, holds) in BOUNDS.items():
        if name in f.metadata and not holds(value, f.metadata[name]):
            return f"{key} {words} {f.metadata[name]}, got {value}"
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        return f"{key} must be one of {', '.join(f.metadata['choices'])}, got {value}"
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean a or b?` for the nearest of the known dotted keys, or nothing.

    Keys whose last part is the same come first (`lr` and `ppo.lr` find `optim.lr`), then the nearest whole
    key, then the nearest last part.
    """
    known = list(known)
    last = word.rpartition(".")[2]
    by_last: dict[str, str] = {}
    for key in known:
        by_last.setdefault(key.rpartition(".")[2], key)
    found = [key for key in known if key.rpartition(".")[2] == last][:2]
    found += get_close_matches(word, known, n=1, cutoff=0.7)
    if not found:
        found = [by_last[near] for near in get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f"; did you mean {' or '.join(dict.fromkeys(found))}?" if found else ""
