"""From our values to what MLflow accepts: names, numbers, texts, batches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

# MLflow 3.17's own limits (mlflow/utils/validation.py)
NAME_LENGTH = 250
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
METRICS_A_BATCH = 1000
PARAMS_A_BATCH = 100
REQUEST_BYTES = 800_000  # of the 1,000,000 of a REST call: room for its keys and braces

Item = TypeVar("Item")


def clean_name(name: str) -> str:
    """A name that every MLflow server accepts.

    Word characters, `.`, `-`, blanks and `/` stay (`:` is refused by servers on Windows), anything else
    becomes `_`; parts that would make it a path to somewhere else (`//`, `.`, `..`) go. A name that is too
    long is cut, with a piece of its hash so that two of them stay two.
    """
    parts = re.sub(r"[^/\w.\- ]", "_", str(name)).split("/")
    cleaned = "/".join(part for part in parts if part not in ("", ".", "..")) or "_"
    if len(cleaned) <= NAME_LENGTH:
        return cleaned
    return cleaned[: NAME_LENGTH - 9] + "_" + hashlib.sha256(cleaned.encode()).hexdigest()[:8]


def number(value: object) -> float:
    """A float from a Python number, a 0-dimensional tensor or a NumPy scalar. TypeError for anything else."""
    if isinstance(value, str | bytes) or value is None:
        raise TypeError(f"not a number: {value!r:.40}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int beyond the doubles
        return float("inf") if value > 0 else float("-inf")  # type: ignore[operator]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"not a number: {value!r:.40}") from error


def as_text(value: object) -> str:
    """Text of a config value as YAML would show it: null, true, [1, 2]; strings stay as they are."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def cut(text: str, length: int) -> str:
    """`text` within `length` characters, with a mark that says what is missing."""
    if len(text) <= length:
        return text
    mark = f" ... [cut, {len(text)} characters]"
    return text[: length - len(mark)] + mark


def flatten(values: Any, prefix: str = "") -> dict[str, object]:
    """Nested mappings and dataclasses as one level of dotted keys; an empty mapping stays a value."""
    if not isinstance(values, Mapping):
        values = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    flat: dict[str, object] = {}
    for key, value in values.items():
        below = flatten(value, f"{prefix}{key}.") if _nested(value) else {}
        flat |= below or {f"{prefix}{key}": value}
    return flat


def _nested(value: object) -> bool:
    return isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def batches(items: Sequence[Item], most: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cut `items` into lists of at most `most` items and REQUEST_BYTES bytes, in order."""
    batch: list[Item] = []
    total = 0
    for item in items:
        cost = size(item)
        if batch and (len(batch) == most or total + cost > REQUEST_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += cost
    if batch:
        yield batch


def table_json(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows in MLflow's own table format (`mlflow.log_table`): pandas' orient="split" without an index.

    Columns are the keys in order of first appearance; a row without a column has null there. nan and inf
    become null (JSON has no word for them), what JSON cannot hold becomes text.
    """
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    named = [{str(key): value for key, value in row.items()} for row in rows]
    data = [[_cell(row.get(column)) for column in columns] for row in named]
    return json.dumps({"columns": columns, "data": data}, ensure_ascii=False)


def _cell(value: object) -> object:
    if value is None or isinstance(value, str | bool):
        return value
    try:
        figure = number(value)
    except TypeError:
        return as_text(value)
    if figure != figure or figure in (float("inf"), float("-inf")):
        return None
    return value if isinstance(value, int) else figure
