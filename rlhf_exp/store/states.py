"""Where an unfinished run can go on: state/step_00012/ in its folder, with a digest of each file in it.

A checkpoint appears whole, under its name, or not at all (atomic); what the disk or a person does to it later shows
in the digests. The last two are kept, so that a damaged one costs a few steps and not the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_exp.store import atomic
from rlhf_exp.store.hashing import sha256_file

STATE = "state"
DIGESTS = "digests.json"
KEPT = 2
NAME = re.compile(r"step_(\d{5,})")


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, damaged ones too, the latest first."""
    folder = run / STATE
    if not folder.is_dir():
        return []
    return sorted((int(m[1]) for p in folder.iterdir() if (m := NAME.fullmatch(p.name))), reverse=True)


def place(run: Path, step: int) -> Path:
    return run / STATE / f"step_{step:05d}"


@contextmanager
def new(run: Path, step: int) -> Iterator[Path]:
    """Yield an empty folder that becomes the checkpoint of `step`; then all but the last ones go.

    A checkpoint of a later step, which can only be a damaged one, stays until its step comes again: it says how far
    an earlier attempt was.
    """
    with atomic.new_folder(place(run, step)) as folder:
        yield folder
        files = {path.name: sha256_file(path) for path in folder.iterdir()}
        (folder / DIGESTS).write_text(json.dumps(files, indent=1), encoding="utf-8")
    for old in [number for number in steps(run) if number <= step][KEPT:]:
        atomic.remove_folder(place(run, old))


def problem(run: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None."""
    folder = place(run, step)
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if sha256_file(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"
    except (ValueError, AttributeError):
        return f"{DIGESTS} cannot be read"
    return None


def remove(run: Path) -> None:
    """Delete all checkpoints; none is no error."""
    if (run / STATE).is_dir():
        atomic.remove_folder(run / STATE)
