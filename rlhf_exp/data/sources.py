"""Where rows are and what they say: finding a dataset, reading rows with their positions, fingerprinting.

A dataset is an existing path, else RLHF_EXP_DATA/<last part of the name>, else a hub id; `builtin:<name>`
is a file of this package. A folder (or hub dataset) stands for its *train* files. Published validation and
test files beside them are neither trained on nor mixed in: the splits of a run are cut by the hash of the
prompt, which alone keeps a prompt on the same side in every view. To read such a file, name it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_exp.data.records import BadRow
from rlhf_exp.errors import InputError

BUILTIN = "builtin:"
DATA_VARIABLE = "RLHF_EXP_DATA"
SUFFIXES = (".jsonl", ".json", ".parquet")
_TRAIN_FILE = re.compile(r"train(ing)?([-_.].*)?", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class File:
    """A data file; with size and time, so that what is cached by it is forgotten when the file changes."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Hub:
    """A hub dataset at a commit."""

    id: str
    commit: str


def locate(key: str, name: str) -> Path | str:
    """The path of dataset `name` (the value of config key `key`), or `name` itself: a hub id."""
    if name.startswith(BUILTIN):
        path = Path(__file__).parent / f"{name.removeprefix(BUILTIN)}.jsonl"
        if not path.is_file():
            raise InputError(f"{key}={name}: the package has no file {path.name}")
        return path
    try:
        candidates = [Path(name).expanduser()]
        if folder := os.environ.get(DATA_VARIABLE):
            candidates.append(Path(folder).expanduser() / candidates[0].name)
        for path in candidates:
            if path.exists():
                return path
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # an unreadable folder, a NUL in the name, an unknown ~user
        raise InputError(f"{key}={name}: {error}") from error
    if _HUB_ID.fullmatch(name) and not name.endswith(SUFFIXES):
        return name
    raise InputError(f"{_not_found(key, name)}. {_what_to_set(key, name)}")


def _not_found(key: str, name: str) -> str:
    folder = os.environ.get(DATA_VARIABLE)
    second = f"{Path(folder) / Path(name).name}" if folder else f"{DATA_VARIABLE} (not set)"
    return f"{key}={name}: not found at {Path(name).expanduser().absolute()}, nor at {second}"


def _what_to_set(key: str, name: str) -> str:
    return f"Set {key} to a file or folder, or {DATA_VARIABLE} to the folder that holds {Path(name).name}"


def open_source(key: str, name: str) -> tuple[File, ...] | Hub:
    """The files of dataset `name` in order, or its commit on the hub. Raises InputError if there are none."""
    found = locate(key, name)
    if isinstance(found, str):
        return Hub(found, _commit(key, found))
    try:
        paths = [found] if found.is_file() else _files_in(key, found)
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{key}: {error.filename}: {error.strerror}") from error
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise InputError(f"{key}: {path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    return tuple(File(p.absolute(), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True))


def _files_in(key: str, folder: Path) -> list[Path]:
    """The train files of a folder, or its only data file; hub clones keep theirs in data/."""
    for place in (folder, folder / "data"):
        there = sorted(p for p in place.iterdir() if p.suffix in SUFFIXES) if place.is_dir() else []
        for suffix in SUFFIXES:  # the same rows in two formats are read once
            if train := [p for p in there if p.suffix == suffix and _TRAIN_FILE.fullmatch(p.stem)]:
                return train
        if len(there) == 1:
            return there
        if there:
            names = ", ".join(p.name for p in there[:5]) + ", ..." * (len(there) > 5)
            raise InputError(
                f"{key}: {place} has no train.jsonl, .json or .parquet; name one of its files: {names}"
            )
    raise InputError(f"{key}: {folder} has no train.jsonl, train.json or train.parquet")


def _commit(key: str, id: str) -> str:
    """The hub's current commit of a dataset; offline, the one that was last seen."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return HfApi().dataset_info(id, timeout=10).sha
    except Exception as error:  # whatever the network stack raises, the user's answer is the same
        last = Path(HF_HUB_CACHE) / f"datasets--{id.replace('/', '--')}" / "refs" / "main"
        if last.is_file():
            return last.read_text().strip()
        raise _unreachable(key, id, error) from error


def _unreachable(key: str, id: str, error: Exception) -> InputError:
    why = " ".join(str(error).split())[:160] or type(error).__name__
    return InputError(f"{_not_found(key, id)}, nor on the hub ({why}). {_what_to_set(key, id)}")


def read_rows(key: str, source: tuple[File, ...] | Hub) -> Iterator[tuple[str, Any]]:
    """Yield (position, row) for every row; where it could not be read, the row is the BadRow that says why.

    Position is `path:line` for lines of JSON and `path: row n` (from 1) otherwise. A file that cannot be
    read at all raises InputError.
    """
    if isinstance(source, Hub):
        yield from _hub_rows(key, source)
        return
    readers = {".jsonl": _lines, ".json": _json, ".parquet": _parquet}
    for file in source:
        try:
            yield from readers[file.path.suffix](file.path)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def _hub_rows(key: str, source: Hub) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.id, split="train", revision=source.commit)
    except Exception as error:
        raise _unreachable(key, source.id, error) from error
    for number, row in enumerate(rows, 1):
        yield f"{source.id}: row {number}", row


def _parsed(raw: bytes) -> Any:
    """A line as JSON, or the BadRow that says why not."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list in a list in a list ...
        return BadRow(f"not JSON: {str(error).split(';')[0]}")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
            if raw:
                yield f"{path}:{number}", _parsed(raw)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of rows, or (as many published .json files are) a row a line."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    if not raw.startswith(b"["):
        yield from _lines(path)
        return
    rows = _parsed(raw)
    if isinstance(rows, BadRow):
        raise InputError(f"{path}: {rows}")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(
            f"{path}: not a parquet file that can be read: {str(error).splitlines()[0]}"
        ) from error


def fingerprint(source: tuple[File, ...] | Hub) -> str:
    """sha256 (hex) of the content: of the files' bytes, whatever their names, or of hub id and commit."""
    parts = (
        [f"hub:{source.id}@{source.commit}"]
        if isinstance(source, Hub)
        else [_digest(file) for file in source]
    )
    return sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(file: File) -> str:
    from hashlib import file_digest

    try:
        with file.path.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error.strerror or error}") from error
