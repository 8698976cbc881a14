"""Checks of the disk before anything expensive starts."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from rlhf_exp.errors import InputError


def _nearest(folder: Path) -> Path:
    """The folder itself, or the closest parent that is there (a broken link counts)."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            return path
    return Path(folder.anchor)


def require_writable(folder: str | Path, key: str = "output_dir") -> None:
    """InputError unless files can be made in `folder`, or in the nearest parent if it does not exist yet.

    key: what sets the folder, for the message.

    It writes and deletes an empty file, since permission bits say nothing of root, ACLs and read-only mounts.
    Nothing else is made: a dry run may ask.
    """
    folder = Path(folder).absolute()
    place = _nearest(folder)
    if not place.is_dir():
        what = "a broken link" if place.is_symlink() else "a file"
        raise InputError(f"cannot write to {folder}: {place} is {what}, not a folder; set {key} to another")
    probe = place / f".rlhf_exp-{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {place}: {error.strerror}; set {key} to another"
        ) from error


def require_space(folder: str | Path, needed: float) -> None:
    """InputError unless the disk of `folder` (made or not) has `needed` bytes free; quotas are not seen."""
    folder = Path(folder).absolute()
    free = shutil.disk_usage(_nearest(folder)).free
    if free < needed:
        raise InputError(
            f"not enough disk space for {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free some (python -m rlhf_exp.store gc shows what can go) or set output_dir to another disk"
        )
