"""The running trials: a line each on a terminal, plain lines elsewhere.

What a trial is doing is read off the end of its log: its process is no terminal, so rlhf_exp.progress writes a line
there every few seconds.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.progress import duration

if TYPE_CHECKING:
    from hydra_plugins.rlhf_local_pool._pool import Running

PROGRESS = re.compile(r"\w+ +\d+/\d+  .*")
TAIL = 8192  # bytes of a log that are looked at
LINE_SECONDS = 60.0  # between two plain lines of a running trial


def doing(log: Path) -> str:
    """The last progress line of a log, else its last line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    progress = [line for line in lines if PROGRESS.fullmatch(line)]
    return (progress or lines or [""])[-1]


def terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


class View:
    """Context manager. total: trials in all; console: rich's, None where there is no terminal."""

    def __init__(self, total: int, *, console: Any = None, clock: Callable[[], float] = time.monotonic):
        self.total, self._clock = total, clock
        self._console = console
        self._live: Any = None
        self._running: list[Running] = []
        self._ended = self._failed = 0
        self._said: dict[int, float] = {}

    def __enter__(self) -> View:
        if self._console is None and terminal():
            from rich.console import Console

            self._console = Console(stderr=True)
        if self._console is not None:
            from rich.live import Live

            self._live = Live(self, console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._running = []
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def started(self, one: Running) -> None:
        self._said[one.job.number] = self._clock()
        words = one.job.varying or " ".join(one.job.overrides)
        self.say(f"trial {one.job.number}: {words} ({one.share}; log: {os.path.relpath(one.log)})")

    def ended(self, number: int, status: str, text: str, failed: bool) -> None:
        self._ended += 1
        self._failed += failed
        self.say(f"trial {number}: {status}{text} ({self._ended} of {self.total})")

    def update(self, running: Iterable[Running]) -> None:
        """Call it often."""
        self._running = list(running)
        if self._live is not None:
            return
        for one in self._running:
            if self._clock() - self._said[one.job.number] >= LINE_SECONDS:
                self._said[one.job.number] = self._clock()
                self.say(f"trial {one.job.number}: {doing(one.log) or 'starting'}")

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.text import Text

        waiting = self.total - self._ended - len(self._running)
        counts = [f"{self._ended} of {self.total} trials ended"]
        counts += [f"{self._failed} failed"] * bool(self._failed) + [f"{waiting} waiting"] * (waiting > 0)
        yield Text(", ".join(counts), style="bold", no_wrap=True, overflow="ellipsis")
        for one in self._running:
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"#{one.job.number} ", style="bold cyan")
            line.append(f"{duration(self._clock() - one.began)} ", style="dim")
            line.append(f"{one.job.varying}  ", style="dim")
            line.append(doing(one.log) or "starting")
            yield line
