"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

Everything is written under a hidden temporary name in the folder where it belongs (a rename is atomic only
within one filesystem), flushed to the disk, renamed, and then the folder that holds the name is flushed. A
folder that takes the place of another goes through

    NAME -> .NAME.old     .NAME.<random>.tmp -> NAME     delete .NAME.old

so that at each moment one complete folder exists; `repair` finishes or undoes what a crash left between two
steps.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"  # never complete: repair deletes it
ASIDE = ".old"  # complete if the name it had is free: repair gives it back, else deletes it


def fsync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file under `folder`, then the folders, the outermost last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync(Path(parent) / name)
        fsync(Path(parent))


def _temporary(path: Path) -> Path:
    # not tempfile: its files and folders are private to the user (0600, 0700), which the rename would keep
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file: after a crash at any moment it holds all of the old or all of the new content."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `target` on success and is deleted on an error.

    What `target` held is replaced as a whole. One writer a target at a time (the build lock).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _restore(target.with_name(f".{target.name}{ASIDE}"))
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        _swap(temporary, target)
    except BaseException:
        delete(temporary)
        raise


def _swap(temporary: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}{ASIDE}")
    replaces = target.exists()
    if replaces:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        _restore(aside)
        raise
    # the new name is on the disk before the old content goes
    fsync(target.parent)
    if replaces:
        delete(aside)


def _owner(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE))


def is_needed(leftover: Path) -> bool:
    """Whether a leftover is old content that `repair` will give back, not waste."""
    return leftover.name.endswith(ASIDE) and not _owner(leftover).exists()


def _restore(aside: Path) -> None:
    """Settle one leftover `.NAME.old`: NAME gets it back, unless the new NAME is already in place."""
    if not aside.exists():
        return
    if is_needed(aside):
        os.rename(aside, _owner(aside))
        fsync(aside.parent)
    else:
        delete(aside)


def leftovers(folder: Path) -> list[Path]:
    """What a crash left under `folder`: temporary files and folders, and old folders put aside."""
    found = []
    for parent, folders, files in os.walk(folder):
        hidden = [
            name for name in (*folders, *files) if name.startswith(".") and name.endswith((TEMPORARY, ASIDE))
        ]
        found += [Path(parent) / name for name in sorted(hidden)]
        folders[:] = [name for name in folders if name not in hidden]
    return found


def repair(folder: Path) -> list[Path]:
    """Undo or finish what a crash interrupted under `folder`; returns the leftovers that are gone.

    Only while nobody writes there: `build_lock` calls it, a reader must not.
    """
    found = leftovers(folder)
    for path in found:
        if path.name.endswith(ASIDE):
            _restore(path)
        else:
            delete(path)
    return found


def remove_folder(folder: Path) -> None:
    """Delete a folder; its name is free at once and never stands for a half-deleted folder."""
    trash = _temporary(folder)
    os.rename(folder, trash)
    fsync(folder.parent)
    delete(trash)


def delete(path: Path) -> None:
    """Delete a leftover as far as that goes; what stays (an open file on NFS) is there for the next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def folder_size(folder: Path) -> int:
    """Bytes in the files under `folder`, links not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            except FileNotFoundError:  # a builder renamed it meanwhile
                continue
    return total
