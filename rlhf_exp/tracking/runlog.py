"""A run's metrics.jsonl and samples.jsonl, line by line, and the same to the tracker and the screen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.tracking.values import number

SAMPLE_ROWS = 2000  # the tracker's table holds the latest of them; samples.jsonl holds all


class _Shows(Protocol):
    def update(self, step: int, metrics: Mapping[str, object]) -> None: ...


class RunLog:
    """One stage's log. A line is in the file when the call returns, whatever the tracker or process does.

    Lines are JSON in the strict sense; nan and the infinities, for which JSON has no word, are the strings
    "NaN", "Infinity" and "-Infinity", which Python's and JavaScript's number parsers read.

    fresh: start empty files; otherwise append, after cutting off a last line that a crash left half written.
    """

    def __init__(
        self, folder: Path | str, tracker: Tracker, progress: _Shows | None = None, fresh: bool = True
    ):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tracker, self._progress = tracker, progress
        if not fresh:
            _cut_torn_line(folder / "metrics.jsonl")
            _cut_torn_line(folder / "samples.jsonl")
        self._rows: list[dict[str, Any]] = [] if fresh else list(read_lines(folder / "samples.jsonl"))
        mode = "w" if fresh else "a"
        self._metrics: IO[str] = open(folder / "metrics.jsonl", mode, encoding="utf-8")  # noqa: SIM115
        self._samples: IO[str] = open(folder / "samples.jsonl", mode, encoding="utf-8")  # noqa: SIM115

    def step(self, step: int, metrics: Mapping[str, object]) -> None:
        """Log the numbers (also 0-dimensional tensors) of one step."""
        plain = {key: _plain(value) for key, value in metrics.items()}
        _write(self._metrics, {"step": int(step), **plain})
        self._tracker.metrics({key: value for key, value in plain.items() if value is not None}, step)
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

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
