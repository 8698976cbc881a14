"""The key of a run: a hash of everything that can change its result, and of nothing else.

Same key, same result: a run folder that carries the key is reused instead of trained again. In the key are
the config leaves that the schema marks as keyed, the content of the data, the keys of the parents, the
content of the base model, the dtype in which it runs, and the stage's version. Paths, names, tracking,
devices and micro-batches are not.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from rlhf_exp.errors import InputError
from rlhf_exp.store.hashing import sha256_file_cached

FULL = "lora.full"
EVALUATE_ON = "dataset.evaluate_on"
FORMAT = 1  # of the document that is hashed; a change makes every old key unknown


@cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _number(kind: type, value: Any, key: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != int(value)):
        raise TypeError(f"{key}: expected {kind.__name__}, got {value!r}")
    # 0.0 + makes -0.0 equal to 0.0
    return int(value) if kind is int else 0.0 + float(value)


def _plain(kind: Any, value: Any, key: str) -> Any:
    """`value` as JSON of its declared type, so that 1 and 1.0 in a float leaf are the same."""
    if value == MISSING:
        raise ValueError(f"{key} has no value: only a complete config has a key")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        present = [argument for argument in arguments if argument is not type(None)]
        return _plain(present[0] if len(present) == 1 else Any, value, key)
    if origin is list or (kind is Any and isinstance(value, list | tuple)):
        return [_plain(arguments[0] if arguments else Any, item, key) for item in value]
    if origin is dict or (kind is Any and isinstance(value, Mapping)):
        return {
            str(name): _plain(arguments[1] if arguments else Any, item, key) for name, item in value.items()
        }
    if kind in (int, float):
        return _number(kind, value, key)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{key}: {type(value).__name__} has no place in a key")


def _keyed(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for f in fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        if not f.metadata.get("keyed", True):
            continue
        if is_dataclass(value):
            yield from _keyed(value, f"{key}.")
        else:
            yield key, _plain(_types(type(config))[f.name], value, key)


def of_adapter(key: str) -> bool:
    """Whether a leaf shapes an adapter and nothing else."""
    return key == "model.lora_targets" or (key.startswith("lora.") and key != FULL)


def canonical(config: Any) -> dict[str, Any]:
    """The keyed leaves of a config dataclass: {"optim.lr": 0.0001, ...}, sorted, in plain JSON types.

    Where all weights are trained (lora.full) there is no adapter, and what shapes one is left out. On which prompts
    is evaluated counts in an evaluation alone. A leaf without a value (???) is a ValueError, a value of another type
    than the declared one a TypeError.
    """
    found = dict(sorted(_keyed(config)))
    if EVALUATE_ON in found and config.stage not in ("eval", "pipeline"):
        found[EVALUATE_ON] = "heldout"
    if found.get(FULL) is True:
        found = {key: value for key, value in found.items() if not of_adapter(key)}
    return found


def key_document(
    config: Any,
    *,
    dtype: str,
    base: str,
    data: Mapping[str, str],
    parents: Mapping[str, str],
    version: int,
    extra: Mapping[str, str] | None = None,
) -> str:
    """The canonical JSON that `run_key` hashes; arguments as there."""
    document = {
        "format": FORMAT,
        # `auto` means another thing on another machine: what it came to counts
        "config": canonical(config) | {"model.dtype": dtype},
        "base": base,
        "data": dict(data),
        "parents": dict(parents),
        "version": version,
        "extra": dict(extra or {}),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def run_key(
    config: Any,
    *,
    dtype: str,
    base: str,
    data: Mapping[str, str],
    parents: Mapping[str, str],
    version: int,
    extra: Mapping[str, str] | None = None,
) -> str:
    """The store key (64 hex digits) of a stage's run.

    config: the stage's resolved root dataclass. dtype: what model.dtype came to. base: content hash of the
    base model. data: view -> fingerprint. parents: role -> key of the run that made it. version: of the
    stage's code, raised when the same inputs give another result. extra: anything else that matters, e.g. the
    source of a reward function.
    """
    document = key_document(
        config, dtype=dtype, base=base, data=data, parents=parents, version=version, extra=extra
    )
    return hashlib.sha256(document.encode("ascii")).hexdigest()


def fingerprint_file(path: str | Path) -> str:
    """sha256 (hex) of a file's content, remembered in cache_dir(). InputError if it cannot be read."""
    try:
        return sha256_file_cached(Path(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def fingerprint_folder(path: str | Path, patterns: Iterable[str] | None = None) -> str:
    """sha256 (hex) of the names and contents of a folder's files; None: all, whatever folder in it they are in.

    patterns: shell patterns, one of which the file's path within the folder must match; `*` does not go into folders:
    `*.json` is of the folder itself, `sub/*.json` of one in it, and what else lies there does not count. Nor do
    hidden files and folders; links are followed. InputError if the folder is not there or nothing matches.
    """
    folder, patterns = Path(path), None if patterns is None else tuple(patterns)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    hasher, count = hashlib.sha256(), 0
    try:
        files = sorted(_visible_files(folder))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    for name, file in files:
        if patterns is None or any(_matches(name, pattern) for pattern in patterns):
            hasher.update(json.dumps([name, fingerprint_file(file)]).encode())
            count += 1
    if not count:
        raise InputError(f"no file in {folder} matches {', '.join(patterns or ['*'])}")
    return hasher.hexdigest()


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, part by part."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path within `folder`, path) of every file that is not hidden."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()  # real paths of folders, because links may form a circle
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                file = Path(parent) / name
                yield file.relative_to(folder).as_posix(), file
