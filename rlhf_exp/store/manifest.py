"""manifest.json: size and sha256 of every file of a finished run, and the check against it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from rlhf_exp.errors import InputError
from rlhf_exp.store import atomic
from rlhf_exp.store.hashing import sha256_file
from rlhf_exp.store.states import STATE

MANIFEST = "manifest.json"
RECORD = "run.json"
# Logs are for reading, not inputs of a later stage, and their writer may still have them open.
LOGS = (".jsonl", ".log")
DATA = ("comparisons.jsonl",)  # a log by its name, but what later stages train on
SHOWN = 5  # problems that are named one by one


class CorruptArtifact(InputError):
    """A finished run whose files are not what they were when it finished: one line a file, and what to do."""

    def __init__(self, folder: Path, problems: list[str]):
        cure = f"delete {folder} to build it again, or run with resume=never"
        lines = [f"{problem}: {cure}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"{folder}: {len(problems) - SHOWN} more files are not as the manifest says")
        super().__init__(lines)


def _files(folder: Path) -> list[str]:
    """Paths (with /) of the files that a manifest lists, sorted; not the checkpoints, which go when a run is done."""
    found = []
    for parent, folders, names in os.walk(folder):
        at_top = Path(parent) == folder
        folders[:] = [name for name in folders if not name.startswith(".") and not (at_top and name == STATE)]
        found += [
            Path(parent, name).relative_to(folder).as_posix() for name in names if not name.startswith(".")
        ]
    return sorted(
        name for name in found if name in DATA or (name not in (MANIFEST, RECORD) and not name.endswith(LOGS))
    )


def write(folder: Path) -> str:
    """Flush and hash every file, write the manifest, and return the manifest's own sha256 (hex)."""
    files = {}
    for name in _files(folder):
        path = folder / name
        atomic.fsync(path)
        files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    content = json.dumps({"files": files}, indent=1).encode()
    atomic.write_bytes(folder / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def listed(folder: Path) -> set[str]:
    """Names in the manifest; empty where there is none that can be read."""
    try:
        return set(json.loads((folder / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _compare(path: Path, expected: dict) -> str | None:
    """What is wrong with one file, or None."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            change = "truncated" if size < expected["size"] else "longer than it was"
            return f"{path} is {change} ({size} bytes, {expected['size']} when the run finished)"
        if sha256_file(path) != expected["sha256"]:
            return f"{path} has other content than when the run finished (sha256 differs)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None


def check(folder: Path, expected: str | None) -> None:
    """CorruptArtifact unless the files are as the manifest says, and that one has the sha256 `expected`.

    Files that came later are no problem. A file is hashed once a process, again only if its size or times
    change.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        files = json.loads(content)["files"]
        rows = {name: {"size": int(row["size"]), "sha256": str(row["sha256"])} for name, row in files.items()}
    except FileNotFoundError:
        raise CorruptArtifact(folder, [f"{path} is missing"]) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            folder, [f"{path} is not a manifest ({type(error).__name__}: {error})"]
        ) from error
    problems = [problem for name, row in rows.items() if (problem := _compare(folder / name, row))]
    if not problems and hashlib.sha256(content).hexdigest() != expected:
        problems = [f"{path} is not the manifest that the run wrote (sha256 differs from run.json)"]
    if problems:
        raise CorruptArtifact(folder, problems)
