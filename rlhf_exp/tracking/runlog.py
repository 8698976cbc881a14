"""A run's metrics.jsonl and samples.jsonl, line by line, and the same to the tracker and the screen."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from rlhf_exp.store.atomic import fsync
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.tracking.values import number

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
NONE = -1  # before the first step
SAMPLE_ROWS = 2000  # the tracker's table holds the latest of them; samples.jsonl holds all


class _Shows(Protocol):
    total: int

    def update(self, step: int, metrics: Mapping[str, object]) -> None: ...
    def finish(self) -> None: ...


class RunLog:
    """One stage's log. A line is in the file when the call returns, whatever the tracker or process does.

    Lines are JSON in the strict sense; nan and the infinities, for which JSON has no word, are the strings
    "NaN", "Infinity" and "-Infinity", which Python's and JavaScript's number parsers read.

    fresh: start empty files; otherwise append, after cutting off a last line that a crash left half written.
    hold: the tracker gets numbers only at `commit` and at a good end, because it can never take them back: what comes
    after a checkpoint may come again. position: go on there, as `position` gave it.
    """

    def __init__(
        self,
        folder: Path | str,
        tracker: Tracker,
        progress: _Shows | None = None,
        fresh: bool = True,
        *,
        hold: bool = False,
        position: Mapping[str, Any] | None = None,
    ):
        self._folder = folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tracker, self._progress, self._hold = tracker, progress, hold
        self._held: list[tuple[int, dict[str, object]]] = []
        self.latest: dict[str, object] = {}  # the numbers of the last step
        # the last step that the tracker was told, and that its store has
        self._tracked, self._arrived = NONE, NONE
        if position is not None:
            self._go_on(position)
        elif not fresh:
            _cut_torn_line(folder / METRICS)
            _cut_torn_line(folder / SAMPLES)
        append = position is not None or not fresh
        self._rows: list[dict[str, Any]] = list(read_lines(folder / SAMPLES)) if append else []
        mode = "a" if append else "w"
        self._metrics: IO[str] = open(folder / METRICS, mode, encoding="utf-8")  # noqa: SIM115
        self._samples: IO[str] = open(folder / SAMPLES, mode, encoding="utf-8")  # noqa: SIM115

    def step(self, step: int, metrics: Mapping[str, object]) -> None:
        """Log the numbers (also 0-dimensional tensors) of one step."""
        self.latest = plain = {key: _plain(value) for key, value in metrics.items()}
        _write(self._metrics, {"step": int(step), **plain})
        self._held.append((int(step), plain))
        if not self._hold:
            self.commit()
        if self._progress is not None:
            self._progress.update(step, plain)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Log sample rows of one step; the tracker's table `samples` shows all steps, with a column step."""
        for row in rows:
            line = {"step": int(step), **{str(key): _plain(value) for key, value in row.items()}}
            _write(self._samples, line)
            self._rows.append(line)
        self._rows = self._rows[-SAMPLE_ROWS:]
        if rows:
            self._tracker.table("samples", self._rows)

    def expect(self, steps: int) -> None:
        """How many steps there will be in all, once that is known better."""
        if self._progress is not None:
            self._progress.total = steps

    def finish_steps(self) -> None:
        """No step comes any more: what is shown of them ends. Samples may still come."""
        if self._progress is not None:
            self._progress.finish()

    def commit(self) -> None:
        """Tell the tracker what it was not told yet."""
        for step, values in self._held:
            if step > self._tracked or not self._hold:
                self._tell(step, values)
        self._held.clear()

    def position(self) -> dict[str, Any]:
        """Where the files end, on the disk, and how far the tracker is once this is committed; plain JSON."""
        for file in (self._metrics, self._samples):
            file.flush()
            fsync(Path(file.name))
        if self._tracker.settled():
            self._arrived = self._tracked
        sizes = {name: (self._folder / name).stat().st_size for name in (METRICS, SAMPLES)}
        tracked = max([self._tracked, *(step for step, _ in self._held)])
        return {
            "bytes": sizes,
            "tracked": tracked,
            "arrived": self._arrived,
            "run_id": self._tracker.run_id,
        }

    @staticmethod
    def beginning(tracked: int) -> dict[str, Any]:
        """The position of an empty log, of which an earlier attempt has told the tracker up to step `tracked`."""
        return {"bytes": {METRICS: 0, SAMPLES: 0}, "tracked": tracked, "arrived": NONE, "run_id": None}

    def _go_on(self, position: Mapping[str, Any]) -> None:
        """Cut the files to where they were, and tell the tracker what may not have reached its store."""
        known = position["arrived"] if position["run_id"] == self._tracker.run_id else NONE
        for line in read_metrics(self._folder / METRICS):
            step = line.pop("step")
            if known < step <= position["tracked"]:
                self._tell(step, line)
        self._tracked, self._arrived = position["tracked"], known
        for name, size in position["bytes"].items():
            if (self._folder / name).exists():
                os.truncate(self._folder / name, size)

    def _tell(self, step: int, values: Mapping[str, object]) -> None:
        self._tracker.metrics({key: value for key, value in values.items() if value is not None}, step)
        self._tracked = max(self._tracked, step)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *exception: object) -> None:
        if kind is None:
            self.commit()
        self.close()


def resend(folder: Path, tracker: Tracker) -> None:
    """Tell the tracker all that a finished run logged: its process was killed with some of it unsent.

    What the store has already, it keeps once (see mlflow_tracker).
    """
    for line in read_metrics(folder / METRICS):
        step = line.pop("step")
        tracker.metrics({key: value for key, value in line.items() if value is not None}, step)
    if rows := list(read_lines(folder / SAMPLES))[-SAMPLE_ROWS:]:
        tracker.table("samples", rows)


def read_lines(path: Path | str) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; none if there is no file, and not a last line that was never finished."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, with nan and the infinities as floats again."""
    words = {"NaN", "Infinity", "-Infinity"}
    return [
        {
            key: float(value) if isinstance(value, str) and value in words else value
            for key, value in line.items()
        }
        for line in read_lines(path)
    ]


def _plain(value: object) -> object:
    """A number as int or float, anything else as it is."""
    if value is None or isinstance(value, str | bool | int | float | list | tuple | Mapping):
        return value
    try:
        return number(value)
    except TypeError:
        return str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _strict(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(_plain(below)) for below in value]
    return _plain(value)


def _write(file: IO[str], line: Mapping[str, object]) -> None:
    file.write(json.dumps(_strict(line), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def _cut_torn_line(path: Path) -> None:
    """Bytes after the last newline are of a write that did not finish."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
