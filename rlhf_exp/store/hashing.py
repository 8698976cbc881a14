"""Content hashes of files, remembered where that is safe."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from rlhf_exp.paths import cache_dir
from rlhf_exp.store import atomic

CHUNK = 1 << 20
REMEMBER_FROM = 1 << 20  # bytes; a smaller file is hashed faster than it is looked up
SETTLED = 2.0  # seconds: a file written later than this may be written again within one tick of its clock

_process_memo: dict[str, tuple[list[int], str]] = {}


def _identity(path: Path) -> list[int]:
    """What changes when a file's content does; ctime and inode see what `cp -p` or `touch -r` hide."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _settled(identity: list[int]) -> bool:
    return time.time() - max(identity[1], identity[2]) / 1e9 > SETTLED


def _digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's content, remembered within this process: a new one reads the disk again."""
    path = Path(path).absolute()
    identity = _identity(path)
    known = _process_memo.get(str(path))
    if known and known[0] == identity:
        return known[1]
    digest = _digest(path)
    # taken before the reading, looked at after it: a file that changed meanwhile is not remembered
    if _settled(identity) and _identity(path) == identity:
        _process_memo[str(path)] = (identity, digest)
    return digest


def sha256_file_cached(path: Path) -> str:
    """sha256 (hex) of a file's content; for a large file remembered in the cache folder, across processes.

    For data sets and base models, which are read often and written by others. The memo is a convenience: an
    unreadable or unwritable cache costs time, never an error.
    """
    path = Path(path).absolute()
    identity = _identity(path)
    if identity[0] < REMEMBER_FROM:
        return sha256_file(path)
    memo = cache_dir() / "fingerprints" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["path"] == str(path) and known["identity"] == identity:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256_file(path)
    if _settled(identity) and _identity(path) == identity:
        content = {"path": str(path), "identity": identity, "sha256": digest}
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(memo, json.dumps(content).encode())
        except OSError:
            pass
    return digest
