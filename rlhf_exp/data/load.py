"""A view of a dataset: rows -> records -> splits, with what was read and what was left out.

    load_view(dataset, "comparisons", "train") -> list[Comparison]
    statistics(dataset, "comparisons")         -> Statistics (print it, log its .metrics())
    check_view(dataset, "comparisons")         before anything loads: raises InputError or returns
    fingerprint(dataset, "comparisons")        -> sha256 of the content, for the store's key

Nothing here imports torch. A file is read once a process; it is read again when it changes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_exp.data import labels, sources
from rlhf_exp.data.records import (
    SPLITS,
    BadRow,
    Comparison,
    Drop,
    Prompt,
    Record,
    half_of,
    kind,
    opening_id,
    split_of,
)
from rlhf_exp.data.templates import check_template
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Dataset

# family -> its module: VIEWS (view -> function of a row and the Dataset); GENERATE (a function of the Dataset
# that makes the rows) where code takes the place of files; REPEATS = True where a row that comes twice counts twice
FAMILIES = {
    "alpaca": "rlhf_exp.data.alpaca",
    "hc3": "rlhf_exp.data.hc3",
    "hh_rlhf": "rlhf_exp.data.hh_rlhf",
    "hh_rlhf_zh": "rlhf_exp.data.hh_rlhf_zh",
    "imdb": "rlhf_exp.data.imdb",
    "jsonl": "rlhf_exp.data.jsonl",
    "randomwalks": "rlhf_exp.data.randomwalks",
    "reviews": "rlhf_exp.data.reviews",
    "rlhf_reward": "rlhf_exp.data.rlhf_reward",
    "sharegpt_preference": "rlhf_exp.data.sharegpt_preference",
    "sst2": "rlhf_exp.data.sst2",
    "tldr": "rlhf_exp.data.tldr",
    "tldr_openai": "rlhf_exp.data.tldr_openai",
}
VIEWS = ("demonstrations", "comparisons", "prompts")
SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Statistics:
    """What a view holds: `rows` were read, `records` of each split came of them (a row may give several)."""

    view: str
    rows: int
    records: Mapping[str, int]
    dropped: Mapping[str, int]
    longer_chosen: float | None

    def __str__(self) -> str:
        kept = ", ".join(f"{number} {split}" for split, number in self.records.items())
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.dropped.items())
        line = f"{self.view}: {self.rows} rows -> {kept}"
        line += f"; left out: {reasons}" if reasons else ""
        if self.longer_chosen is not None:
            line += f"; the longer answer is the chosen one in {100 * self.longer_chosen:.1f} %"
        return line

    def metrics(self) -> dict[str, float]:
        """Flat names for a tracker."""
        found = {
            f"data/{self.view}/rows": float(self.rows),
            f"data/{self.view}/left_out": float(sum(self.dropped.values())),
        }
        found |= {f"data/{self.view}/{split}": float(number) for split, number in self.records.items()}
        if self.longer_chosen is not None:
            found[f"data/{self.view}/longer_chosen"] = self.longer_chosen
        return found


def longer_chosen(comparisons: Sequence[Comparison]) -> float:
    """Accuracy of the rule "the longer answer wins" (in characters, a tie is half right): the baseline."""
    lead = [len(c.chosen) - len(c.rejected) for c in comparisons]
    return sum((d > 0) + 0.5 * (d == 0) for d in lead) / len(lead)


def _rows_to_records(dataset: Dataset, view: str) -> Callable[[Mapping[str, Any], Dataset], list[Record]]:
    functions = _module(dataset).VIEWS
    if view not in functions:
        raise InputError(f"dataset.family={dataset.family} has no {view} (it has: {', '.join(functions)})")
    return functions[view]


def _module(dataset: Dataset) -> Any:
    if dataset.family not in FAMILIES:
        raise InputError(f"dataset.family must be one of {', '.join(FAMILIES)}, got {dataset.family}")
    return import_module(FAMILIES[dataset.family])


def _name(dataset: Dataset, view: str) -> tuple[str, str]:
    """The config key that says where a view is, and its value."""
    if view not in VIEWS:
        raise ValueError(f"no view {view!r}, there are {', '.join(VIEWS)}")
    _rows_to_records(labels.read_as(dataset, view), view)
    key, name = f"dataset.views.{view}", getattr(dataset.views, view)
    if not name:
        raise InputError(f"{key} is not set: dataset {dataset.name} does not say where its {view} are")
    return key, name


def locate(dataset: Dataset, view: str) -> Path | str:
    """The file or folder of a view, or its hub id. Raises InputError if it can be neither."""
    return sources.locate(*_name(dataset, view), dataset.name)


def fingerprint(dataset: Dataset, view: str) -> str:
    """sha256 (hex) of the view's content: it changes with the bytes of its files, not with their names."""
    return sources.fingerprint(_source(dataset, view))


def _source(dataset: Dataset, view: str) -> sources.Source:
    key, name = _name(dataset, view)
    dataset = labels.read_as(dataset, view)
    if generate := getattr(_module(dataset), "GENERATE", None):
        return sources.Generated(dataset.family, tuple(json.dumps(row) for row in generate(dataset)))
    return sources.open_source(key, name, dataset.revision, dataset.name)


def check_view(dataset: Dataset, view: str, splits: Iterable[str] = ("train",)) -> None:
    """Raise InputError, a line for each thing that would make `load_view` or the template fail."""
    check_template(dataset.template)
    for split in splits:
        load_view(dataset, view, split)


def load_view(dataset: Dataset, view: str, split: str) -> list[Record]:
    """The records of one split of a view, in the order of the file.

    A split without records is an InputError, except validation where `validation_share` is 0.
    `dataset.half` is of the training comparisons, and comes before `dataset.limit`, which keeps the training rows of
    the smallest prompt ids: a sample spread over the file, and the same prompts in every view.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}, there are {', '.join(SPLITS)}")
    may_be_empty = split == "validation" and dataset.validation_share == 0
    if split == "heldout":
        split = dataset.evaluate_on
    records, _, _ = _view(dataset, view)
    found = [r for r in records if _split(r, dataset) == split and not _other_half(r, dataset, split)]
    if not found and not may_be_empty:
        raise InputError(_empty_split(dataset, view, split, len(records)))
    if split == "train" and 0 < dataset.limit < len(found):
        kept = sorted(range(len(found)), key=lambda i: found[i].id)[: dataset.limit]
        found = [found[i] for i in sorted(kept)]
    return found


def _split(record: Record, dataset: Dataset) -> str:
    return split_of(opening_id(record.prompt), dataset.validation_share, dataset.heldout_share)


def _other_half(record: Record, dataset: Dataset, split: str) -> bool:
    """Whether `dataset.half` leaves a record out. Only of training: validation pairs serve both halves alike."""
    if dataset.half is None or split != "train" or not isinstance(record, Comparison):
        return False
    return half_of(opening_id(record.prompt)) != dataset.half


def _empty_split(dataset: Dataset, view: str, split: str, records: int) -> str:
    shares = f"validation_share={dataset.validation_share}, heldout_share={dataset.heldout_share}"
    change = "lower them" if split == "train" else f"raise dataset.{split}_share"
    if split == "train" and dataset.half:
        shares += f", half={dataset.half}"
    name = getattr(dataset.views, view)
    return (
        f"dataset.views.{view}={name}: none of the {records} records falls into the {split} split "
        f"({shares}): {change} or add data"
    )


def statistics(dataset: Dataset, view: str) -> Statistics:
    """Rows, records a split (before `dataset.limit`), what was left out and why, length-only baseline."""
    records, rows, dropped = _view(dataset, view)
    places = [(r, _split(r, dataset)) for r in records]
    splits = Counter(split for r, split in places if not _other_half(r, dataset, split))
    if others := len(records) - splits.total():
        dropped = {**dropped, "of the other half": others}
    share = longer_chosen(records) if view == "comparisons" else None
    return Statistics(view, rows, {split: splits[split] for split in SPLITS}, dict(dropped), share)


def _view(dataset: Dataset, view: str) -> tuple[tuple[Record, ...], int, Mapping[str, int]]:
    key, name = _name(dataset, view)
    dataset = labels.read_as(dataset, view)
    return _read(key, name, _source(dataset, view), _ToRecords(dataset, view), dataset.on_bad_row == "skip")


class _ToRecords:
    """A row of a view -> its records. Equal to another where family, view and options are: what `_read` caches by."""

    def __init__(self, dataset: Dataset, view: str) -> None:
        self.dataset, self.function = dataset, _rows_to_records(dataset, view)
        self.repeats = getattr(_module(dataset), "REPEATS", False)
        options = (dataset.fields, dataset.hc3, dataset.prompt_words, dataset.early_difference)
        self.key = f"{dataset.family} {view} {options}"

    def __call__(self, row: Mapping[str, Any]) -> list[Record]:
        return self.function(row, self.dataset)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ToRecords) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class _BadRows:
    """Collects bad rows: the first few with position and reason, the others by number."""

    def __init__(self) -> None:
        self.number, self.first = 0, []

    def add(self, position: str, reason: BadRow) -> None:
        self.number += 1
        if self.number <= SHOWN_BAD_ROWS:
            self.first.append(f"{position}: {reason}")

    def lines(self, where: str, rows: int) -> list[str]:
        """One line each, then how many more."""
        others = self.number - len(self.first)
        return self.first + ([f"{where}: and {others} more bad rows of {rows}"] if others else [])


@lru_cache(maxsize=8)
def _read(
    key: str,
    name: str,
    source: sources.Source,
    to_records: _ToRecords,
    skip: bool,
) -> tuple[tuple[Record, ...], int, Mapping[str, int]]:
    """All records of a source without repetitions, the number of its rows, what was left out by reason."""
    records: dict[Any, Record] = {}
    rows, dropped, bad = 0, Counter(), _BadRows()
    for position, row in sources.read_rows(key, source):
        rows += 1
        try:
            for record in to_records(_fields(row)):
                if isinstance(record, Drop):  # a part of the row
                    dropped[str(record)] += 1
                    continue
                # prompts are sampled from, and their randomness is keyed by id: one of each
                same = record.id if isinstance(record, Prompt) else (record, rows * to_records.repeats)
                dropped["duplicate"] += same in records
                records.setdefault(same, record)
        except Drop as reason:
            dropped[str(reason)] += 1
        except BadRow as reason:
            bad.add(position, reason)
    where = ", ".join(str(file.path) for file in source) if isinstance(source, tuple) else name
    if bad.number and not skip:
        raise InputError(
            [*bad.lines(where, rows), "dataset.on_bad_row=skip leaves bad rows out and counts them"]
        )
    if not rows:
        raise InputError(f"{key}: {where} has no rows")
    dropped["bad"] += bad.number
    dropped = {reason: number for reason, number in dropped.items() if number}
    if not records:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        raise InputError(
            [*bad.lines(where, rows), f"{key}: all {rows} rows of {where} are left out: {reasons}"]
        )
    return tuple(records.values()), rows, dropped


def _fields(row: Any) -> Mapping[str, Any]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"must be an object with fields, is {kind(row)}")
    return row
