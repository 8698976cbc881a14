"""What became of each trial of a sweep: ledger.jsonl in its folder, a JSON object a line, only ever appended to.

    trial      number, overrides                       it is part of the sweep
    submitted  number, job                             it waits in a queue
    started    number, host, pid, job                  a process runs it
    ended      number, status, reason, objective, ...  done, failed, stopped, interrupted

Every event has its `time`. Who knows of it writes it: a trial's process that it started and how it ended, a launcher
that it was submitted, and how one ended whose process cannot say so any more. Processes on several machines write at
once: a line is one write to a file opened for appending, under flock. A line that a crash tore is skipped.

A job may run before whoever submitted it has said so: a `submitted` that comes after the job's own `started` or
`ended` changes nothing of how the trial stands.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp.store.runs import now, plain

LEDGER = "ledger.jsonl"
TRIAL, SUBMITTED, STARTED, ENDED = "trial", "submitted", "started", "ended"
WAITING, RUNNING = "waiting", "running"
DONE, FAILED, STOPPED, INTERRUPTED = "done", "failed", "stopped", "interrupted"
SETTLED = (DONE, STOPPED)  # what a resumed sweep does not run again


def append(sweep: Path, event: str, **fields: Any) -> None:
    """Add an event; nan and infinities become null. The sweep's folder is made if it is not there."""
    append_all(sweep, event, [fields])


def append_all(sweep: Path, event: str, each: Iterable[Mapping[str, Any]]) -> None:
    """Add an event for each of these fields, all in one write."""
    if lines := [_line(event, fields) for fields in each]:
        write_line(Path(sweep) / LEDGER, "\n".join(lines))


def _line(event: str, fields: Mapping[str, Any]) -> str:
    return json.dumps(plain({"event": event, "time": now(), **fields}), ensure_ascii=False, allow_nan=False)


def write_line(path: Path, line: str) -> None:
    """Append a line (or several, with newlines between them) to a file that other processes append to as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when the descriptor is closed
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, f"{chr(10) if torn else ''}{line}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(sweep: Path) -> list[dict[str, Any]]:
    """Every event in order; [] where there is no ledger."""
    return read_lines(Path(sweep) / LEDGER)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, without lines that were never finished."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


@dataclass
class State:
    """A trial as its events leave it."""

    number: int
    overrides: list[str] = field(default_factory=list)
    status: str = WAITING
    seconds: float = 0.0  # of all its attempts
    attempts: int = 0
    job: str | None = None
    queued: str | None = None  # the job as which it was submitted, unless it was started in another way since
    host: str | None = None
    pid: int | None = None
    end: dict[str, Any] = field(default_factory=dict)  # of the last `ended`: objective, gold, kl, run ...

    @property
    def settled(self) -> bool:
        return self.status in SETTLED

    @property
    def open(self) -> bool:
        """Whether a job of it waits or runs, as far as is known here: one that was interrupted goes on."""
        waits = self.status in (SUBMITTED, RUNNING)
        back = self.status == INTERRUPTED and not self.end.get("lost")
        return self.queued is not None and (waits or back)

    @property
    def reason(self) -> str:
        return str(self.end.get("reason") or "")


def states(sweep: Path) -> dict[int, State]:
    """Number -> how the trial stands, by number."""
    return fold(read(sweep))


def fold(events: Iterable[dict[str, Any]]) -> dict[int, State]:
    """What the events come to; an event that this version does not know changes nothing."""
    found: dict[int, State] = {}
    begun: set[tuple[int, str | None]] = set()
    for event in events:
        number = event.get("number")
        if not isinstance(number, int):
            continue
        state = found.setdefault(number, State(number))
        kind, job = event.get("event"), _text(event.get("job"))
        if kind in (STARTED, ENDED):
            begun.add((number, job))
        if kind == TRIAL:
            state.overrides = [str(line) for line in event.get("overrides") or ()]
        elif kind == SUBMITTED:
            state.job = state.queued = job
            if (number, job) not in begun:
                state.status = SUBMITTED
        elif kind == STARTED:
            state.status, state.attempts = RUNNING, state.attempts + 1
            state.host, state.pid = _text(event.get("host")), event.get("pid")
            state.job = job or state.job
            state.queued = state.queued if state.queued == job else None
        elif kind == ENDED:
            state.status, state.end = str(event.get("status")), event
            state.seconds += float(event.get("seconds") or 0.0)
    return {number: found[number] for number in sorted(found)}


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
