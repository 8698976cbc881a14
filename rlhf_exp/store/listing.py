"""What is in a store: the entries, how a user names one, and the table of `ls`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf_exp.errors import InputError
from rlhf_exp.store import atomic, locks, states
from rlhf_exp.store.manifest import CorruptArtifact
from rlhf_exp.store.runs import FINISHED, FOLDER_NAME, PREFIX, RUNNING, RunFolder

CORRUPT, STOPPED, EMPTY = "CORRUPT", "STOPPED", "EMPTY"  # beside the states that run.json can hold
COLOURS = {FINISHED: "green", RUNNING: "cyan", CORRUPT: "red", "FAILED": "red"}
MAIN_METRICS = 4  # shown in `ls`: a stage puts the ones that matter first


@dataclass
class Entry:
    """One run folder as it is found on the disk."""

    folder: RunFolder
    record: dict[str, Any]  # run.json; {} if it cannot be read or is not there
    problem: str | None = None  # why it cannot be read

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def stage(self) -> str:
        return self.record.get("stage") or self.path.parent.name

    @property
    def key(self) -> str:
        return self.record.get("key") or self.path.name[:PREFIX]

    @property
    def name(self) -> str:
        """How a user can name it: stage/folder."""
        return f"{self.stage}/{self.path.name}"

    @cached_property
    def held(self) -> bool:
        return locks.is_held(self.path)

    @property
    def state(self) -> str:
        """run.json's status, or STOPPED (RUNNING, but its process is gone), EMPTY (no run.json), CORRUPT."""
        if self.problem:
            return CORRUPT
        status = self.record.get("status") or EMPTY
        if status == FINISHED:
            return status
        if self.held:
            return RUNNING
        return STOPPED if status == RUNNING else status

    @cached_property
    def size(self) -> int:
        return atomic.folder_size(self.path)

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """base, data and parents of run.json, {} where there is none."""
        given = self.record.get("inputs") or {}
        return {part: given.get(part) or {} for part in ("base", "data", "parents")}

    @property
    def when(self) -> datetime | None:
        """When it ended, else when it started."""
        text = self.record.get("ended") or self.record.get("started")
        try:
            return datetime.fromisoformat(text) if text else None
        except (TypeError, ValueError):
            return None


def entry(path: Path) -> Entry:
    folder = RunFolder(path)
    try:
        return Entry(folder, folder.read())
    except CorruptArtifact as error:
        return Entry(folder, {}, error.problems[0])


def scan(output_dir: Path) -> list[Entry]:
    """Every run folder, by stage and time. Only folders named like ours: trackers keep theirs there too."""
    if not output_dir.is_dir():
        raise InputError(f"no such folder: {output_dir}; give the runs' folder with --dir")
    if not os.access(output_dir, os.R_OK | os.X_OK):  # glob would find nothing, and say nothing
        raise InputError(f"{output_dir} cannot be read: permission denied")
    entries = [entry(path) for path in output_dir.glob("*/*") if is_run_folder(path)]
    return sorted(
        entries, key=lambda e: (e.path.parent.name, e.when.timestamp() if e.when else 0.0, e.path.name)
    )


def is_run_folder(path: Path) -> bool:
    hidden = path.parent.name.startswith(".")
    return bool(FOLDER_NAME.fullmatch(path.name)) and not hidden and path.is_dir() and not path.is_symlink()


def resolve(output_dir: Path, text: str) -> Entry:
    """The run that a user means: its folder, first digits of its key, or stage/digits; else InputError."""
    path = Path(text)
    if (path / "run.json").exists():
        return entry(path)
    stage, _, prefix = text.rpartition("/")
    found = [e for e in scan(output_dir) if stage in ("", e.stage, e.path.parent.name)]
    exact = [e for e in found if prefix in (e.path.name, e.key)]
    # a whole folder name means that folder, though others (-2) begin with it
    hits = exact if len(exact) == 1 else [e for e in found if prefix and _begins(e, prefix)]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise InputError(f"{text} can mean {', '.join(e.name for e in hits)}: give more of it")
    raise InputError(
        f"no run {text} in {output_dir}: python -m rlhf_exp.store --dir {output_dir} ls shows what is there"
    )


def _begins(e: Entry, prefix: str) -> bool:
    return e.path.name.startswith(prefix) or e.key.startswith(prefix)


def human(size: float) -> str:
    """Bytes for people, in powers of 1000: 950 B, 3.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def figure(value: Any) -> str:
    """A metric for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def exact(value: Any) -> str:
    """A config value, such that two that differ look different: quotes where blanks would not be seen."""
    if isinstance(value, str):
        return value if value and value.isprintable() and " " not in value else repr(value)
    return "-" if value is None else str(value)


def numbers(metrics: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a metrics tree with dotted names, in its order."""
    for name, value in (metrics or {}).items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def base_text(e: Entry) -> str:
    base = e.inputs["base"]
    return " ".join(str(base[part]) for part in ("name", "dtype") if base.get(part)) or "-"


def parents_text(e: Entry) -> str:
    parents = e.inputs["parents"].items()  # by role: reward, reward_1 and gold are of one stage
    return ", ".join(f"{role} {str(p.get('key'))[:6]}" for role, p in parents) or "-"


def saved_text(e: Entry) -> str:
    """From where an unfinished run goes on."""
    steps = states.steps(e.path) if e.state != FINISHED else []
    return f"saved at step {steps[0]}" if steps else "-"


def when_text(e: Entry) -> str:
    return e.when.astimezone().strftime("%Y-%m-%d %H:%M") if e.when else "-"


def table(entries: list[Entry]) -> Table:
    """The table of `ls`."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "key", "status", "when", "size", "base", "parents", "metrics"):
        rows.add_column(
            column,
            justify="right" if column == "size" else "left",
            no_wrap=column in ("key", "status", "size"),
        )
    for e in entries:
        shown = list(numbers(e.record.get("metrics")))[:MAIN_METRICS]
        metrics = ", ".join(f"{name} {figure(value)}" for name, value in shown) or saved_text(e)
        status = f"[{COLOURS.get(e.state, 'yellow')}]{e.state}[/]"
        cells = (
            e.stage,
            e.path.name,
            status,
            when_text(e),
            human(e.size),
            base_text(e),
            parents_text(e),
            metrics,
        )
        rows.add_row(*cells)
    return rows
