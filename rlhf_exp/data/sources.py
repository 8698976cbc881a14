"""Where rows are and what they say: finding a dataset, reading rows with their positions, fingerprinting.

A dataset is an existing path, else RLHF_EXP_DATA/<last part of the name>, else RLHF_EXP_DATA/<name of the
dataset's config>, else a hub id; `builtin:<name>` is a file of this package. A folder (or hub dataset) stands
for its *train* files, else for its all.jsonl (or .json ..), else for its only file. Published validation and
test files beside them are neither trained on nor mixed in: the splits of a run are cut by the hash of the
prompt, which alone keeps a prompt on the same side in every view. To read such a file, name it.

`owner/name:path/in/it.jsonl` is one file of a hub dataset, for sets that the `datasets` library cannot read
whole (with a loading script, or files of several kinds); it is also sought in a local folder of that name.
`owner/name@revision:..` pins a branch, tag or commit of this one (`dataset.revision` does of all views).
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

from rlhf_exp.data.formats import SUFFIXES, file_rows, suffix_of
from rlhf_exp.errors import InputError

BUILTIN = "builtin:"
DATA_VARIABLE = "RLHF_EXP_DATA"
_TRAIN_FILE = re.compile(r"train(ing)?([-_.].*)?", re.IGNORECASE)
_ALL_FILE = re.compile(r"all", re.IGNORECASE)  # HC3: beside it are files of its parts
_HUB_NAME = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+))?", re.ASCII
)


@dataclass(frozen=True)
class File:
    """A data file; with size and time, so that what is cached by it is forgotten when the file changes."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Hub:
    """A hub dataset at a commit, or one file of it."""

    id: str
    commit: str
    file: str = ""


@dataclass(frozen=True)
class Generated:
    """Rows that code of this package makes, as lines of JSON."""

    family: str
    lines: tuple[str, ...]


Source = tuple[File, ...] | Hub | Generated


def locate(key: str, name: str, config: str = "") -> Path | str:
    """The path of dataset `name` (the value of config key `key`), or `name` itself: a hub id.

    `config` is the dataset's name in conf/dataset, by which its folder may go too.
    """
    if name.startswith(BUILTIN):
        path = Path(__file__).parent / f"{name.removeprefix(BUILTIN)}.jsonl"
        if not path.is_file():
            raise InputError(f"{key}={name}: the package has no file {path.name}")
        return path
    try:
        for path in _candidates(name, config):
            if path.exists():
                return path
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # an unreadable folder, a NUL in the name, an unknown ~user
        raise InputError(f"{key}={name}: {error}") from error
    hub = _HUB_NAME.fullmatch(name)
    if hub and not hub["id"].endswith(SUFFIXES):
        if hub["file"] and not hub["file"].endswith(SUFFIXES):
            raise InputError(f"{key}: {name}: unknown kind of file, expected {', '.join(SUFFIXES)}")
        return name
    raise InputError(f"{_not_found(key, name)}. {_what_to_set(key, name)}")


def _candidates(name: str, config: str) -> Iterator[Path]:
    """Where a dataset may be on this machine, best first; a file of a folder before the whole folder."""
    yield Path(name).expanduser()
    hub = _HUB_NAME.fullmatch(name)
    file = hub["file"] if hub else None
    places = [Path(_bare(name)).expanduser()]
    if folder := os.environ.get(DATA_VARIABLE):
        places.append(Path(folder).expanduser() / places[0].name)
        places += [Path(folder).expanduser() / config] * bool(config)
    for place in places:
        if file:
            yield place / file
        yield place


def _bare(name: str) -> str:
    """A hub name without revision and file; any other name as it is."""
    hub = _HUB_NAME.fullmatch(name)
    return hub["id"] if hub else name


def _not_found(key: str, name: str) -> str:
    folder, bare = os.environ.get(DATA_VARIABLE), _bare(name)
    second = f"{Path(folder) / Path(bare).name}" if folder else f"{DATA_VARIABLE} (not set)"
    return f"{key}={name}: not found at {Path(bare).expanduser().absolute()}, nor at {second}"


def _what_to_set(key: str, name: str) -> str:
    return (
        f"Set {key} to a file or folder, or {DATA_VARIABLE} to the folder that holds {Path(_bare(name)).name}"
    )


def open_source(key: str, name: str, revision: str | None = None, config: str = "") -> tuple[File, ...] | Hub:
    """The files of dataset `name` in order, or its commit on the hub. Raises InputError if there are none."""
    found = locate(key, name, config)
    if isinstance(found, str):
        hub = _HUB_NAME.fullmatch(found)
        return Hub(hub["id"], _commit(key, hub["id"], hub["revision"] or revision), hub["file"] or "")
    try:
        paths = [found] if found.is_file() else _files_in(key, found)
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{key}: {error.filename}: {error.strerror}") from error
    for path in paths:
        if not suffix_of(path):
            raise InputError(f"{key}: {path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    return tuple(File(p.absolute(), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True))


def _files_in(key: str, folder: Path) -> list[Path]:
    """The train files of a folder, its all.*, or its only data file; hub clones keep theirs in data/."""
    for place in (folder, folder / "data"):
        there = sorted(p for p in place.iterdir() if suffix_of(p)) if place.is_dir() else []
        for pattern in (_TRAIN_FILE, _ALL_FILE):
            for suffix in SUFFIXES:  # the same rows in two formats are read once
                of_kind = [p for p in there if suffix_of(p) == suffix]
                if found := [p for p in of_kind if pattern.fullmatch(p.name.removesuffix(suffix))]:
                    return found
        if len(there) == 1:
            return there
        if there:
            names = ", ".join(p.name for p in there[:5]) + ", ..." * (len(there) > 5)
            raise InputError(
                f"{key}: {place} has no train.jsonl, .json or .parquet; name one of its files: {names}"
            )
    raise InputError(f"{key}: {folder} has no train.jsonl, train.json or train.parquet")


def _commit(key: str, id: str, revision: str | None) -> str:
    """The commit of a branch or tag of a hub dataset, by default the current one; offline, the one last seen."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return HfApi().dataset_info(id, revision=revision, timeout=10).sha
    except Exception as error:  # whatever the network stack raises, the user's answer is the same
        last = Path(HF_HUB_CACHE) / f"datasets--{id.replace('/', '--')}" / "refs" / (revision or "main")
        if last.is_file():
            return last.read_text().strip()
        raise _unreachable(key, id, error) from error


def _unreachable(key: str, id: str, error: Exception) -> InputError:
    why = " ".join(str(error).split())[:160] or type(error).__name__
    return InputError(f"{_not_found(key, id)}, nor on the hub ({why}). {_what_to_set(key, id)}")


def read_rows(key: str, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (position, row) for every row; where it could not be read, the row is the BadRow that says why.

    Position is `path:line` for lines of JSON and `path: row n` (from 1) otherwise. A file that cannot be
    read at all raises InputError.
    """
    if isinstance(source, Hub):
        yield from _hub_rows(key, source)
        return
    if isinstance(source, Generated):
        yield from ((f"{source.family}: row {i}", json.loads(line)) for i, line in enumerate(source.lines, 1))
        return
    for file in source:
        yield from file_rows(file.path)


def _hub_rows(key: str, source: Hub) -> Iterator[tuple[str, Any]]:
    if source.file:
        yield from _hub_file_rows(key, source)
        return
    from datasets import load_dataset

    try:
        rows = load_dataset(source.id, split="train", revision=source.commit)
    except Exception as error:
        line = _unreachable(key, source.id, error).problems[0]
        raise InputError(f"{line}, or name one of its files: {key}={source.id}:FILE") from error
    for number, row in enumerate(rows, 1):
        yield f"{source.id}: row {number}", row


def _hub_file_rows(key: str, source: Hub) -> Iterator[tuple[str, Any]]:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(source.id, source.file, repo_type="dataset", revision=source.commit)
    except Exception as error:
        raise _unreachable(key, f"{source.id}:{source.file}", error) from error
    for position, row in file_rows(Path(path)):
        yield f"{source.id}:{source.file}{position.removeprefix(path)}", row


def fingerprint(source: Source) -> str:
    """sha256 (hex) of the content: of the files' bytes, whatever their names, or of hub id and commit."""
    if isinstance(source, Hub):
        parts = [f"hub:{source.id}@{source.commit}" + f":{source.file}" * bool(source.file)]
    elif isinstance(source, Generated):
        parts = list(source.lines)
    else:
        parts = [_digest(file) for file in source]
    return sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=64)
def _digest(file: File) -> str:
    from hashlib import file_digest

    try:
        with file.path.open("rb") as stream:
            return file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error.strerror or error}") from error
