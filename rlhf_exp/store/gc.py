"""`gc`: what can go. Nothing that a run which stays was made from is ever among it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from rlhf_exp.store import atomic, listing, locks, states
from rlhf_exp.store.listing import EMPTY, Entry
from rlhf_exp.store.runs import FINISHED, PREFIX, RUNNING
from rlhf_exp.store.states import STATE

# a run folder on its way to deletion, a probe of require_writable
TRASH = re.compile(rf"\.([0-9a-f]{{{PREFIX}}}(-\d+)?\..*|rlhf_exp-[0-9a-f]+)\.tmp")
DAY = 24 * 3600


@dataclass(frozen=True)
class Candidate:
    path: Path
    reason: str
    run: Path | None  # the run folder whose lock protects it; None: nobody uses it
    finished: bool = False

    @property
    def size(self) -> int:
        """Bytes that its deletion frees."""
        return atomic.folder_size(self.path) if self.path.is_dir() else self.path.lstat().st_size


def _perhaps_elsewhere(e: Entry) -> bool:
    """Signed by another machine and changed within a day: its flock may not be visible here (see locks)."""
    who = locks.holder(e.path)
    if who is None or who["host"] == locks.hostname():
        return False
    newest = max(path.lstat().st_mtime for path in (e.path, *e.path.rglob("*")))
    return time.time() - newest < DAY


def _goes(e: Entry, parents: set[str], unused_since: datetime | None) -> str | None:
    """Why a run can go; None if it stays. parents: as `_needed` gives them."""
    if _is_needed(e, parents) or e.state == RUNNING:
        return None
    if e.state != FINISHED:
        # what nothing says is ours goes only if it is empty
        if _perhaps_elsewhere(e) or (e.state == EMPTY and e.size):
            return None
        return "never started" if e.state == EMPTY else e.state.lower()
    if unused_since and e.when and e.when < unused_since:
        return f"finished {listing.when_text(e)}, parent of nothing"
    return None


def _needed(entries: list[Entry]) -> set[str]:
    """Keys of what finished runs and living ones were made from."""
    stay = [e for e in entries if e.state in (FINISHED, RUNNING) or _perhaps_elsewhere(e)]
    return {str(parent.get("key")) for e in stay for parent in e.inputs["parents"].values()}


def _is_needed(e: Entry, parents: set[str]) -> bool:
    # of a run whose run.json cannot be read only the folder's name tells the key
    return any(parent.startswith(e.key) for parent in parents)


def plan(output_dir: Path, unused_days: float | None = None) -> list[Candidate]:
    """Runs that are failed, killed, stopped, corrupt or empty, and the leftovers of crashes in the others.

    unused_days: also finished runs which no finished or living run has as a parent and which are that many
    days old. One generation at a time: what becomes unused by this is for the next call.
    """
    entries = listing.scan(output_dir)
    since = None if unused_days is None else datetime.now(UTC) - timedelta(days=unused_days)
    parents, found = _needed(entries), []
    for e in entries:
        if reason := _goes(e, parents, since):
            found.append(Candidate(e.path, reason, e.path, finished=e.state == FINISHED))
        elif e.state != RUNNING and not _perhaps_elsewhere(e):
            found += [Candidate(path, "leftover of a crash", e.path) for path in _leftovers(e.path)]
            if e.state == FINISHED and (e.path / STATE).is_dir():
                found.append(
                    Candidate(e.path / STATE, "checkpoints of a finished run", e.path, finished=True)
                )
    places = (output_dir, *(path for path in output_dir.iterdir() if path.is_dir() and not path.is_symlink()))
    trash = sorted(path for place in places for path in place.iterdir() if TRASH.fullmatch(path.name))
    return found + [Candidate(path, "leftover of a crash", None) for path in trash]


def _leftovers(run: Path) -> list[Path]:
    """Temporary files and folders of a run, but not the old content that `repair` gives back."""
    return [path for path in atomic.leftovers(run) if not atomic.is_needed(path)]


def delete(candidate: Candidate, output_dir: Path, say: Callable[[str], None]) -> int:
    """Delete a candidate, unless a builder has taken it up since `plan`; returns the bytes freed."""
    size = candidate.size
    if candidate.run is None:
        atomic.delete(candidate.path)
        return size
    try:
        with locks.build_lock(candidate.run, timeout=0):  # which clears leftovers
            e = listing.entry(candidate.run)
            finished = e.record.get("status") == FINISHED
            if candidate.path.name == STATE and finished:
                states.remove(candidate.run)
            if candidate.path != candidate.run:
                return size
            if finished != candidate.finished or _is_needed(e, _needed(listing.scan(output_dir))):
                say(f"{candidate.path} stays: it changed, or a run that uses it began, a moment ago")
                return 0
            atomic.remove_folder(candidate.run)
            return size
    except TimeoutError:
        say(f"{candidate.path} stays: a process is building it")
        return 0


def render(candidates: list[Candidate], output_dir: Path) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("can go", overflow="fold")
    rows.add_column("size", justify="right", no_wrap=True)
    rows.add_column("because")
    for candidate in candidates:
        path = candidate.path.relative_to(output_dir)
        rows.add_row(escape(str(path)), listing.human(candidate.size), candidate.reason)
    return rows
