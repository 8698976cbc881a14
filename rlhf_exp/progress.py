"""How far a stage is and how it is going: one line that never wraps on a terminal, plain lines in a log.

The bar is drawn (on stderr) if both stdout and stderr are terminals; otherwise a line goes to stdout every
ten seconds, besides the first and the last, so that `| tee log` and batch systems keep something worth
reading.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live

LINE_SECONDS = 10.0
WINDOW = (
    30  # steps that the ETA is judged by: the first ones are slow, and a resumed run starts in the middle
)
BAR_WIDTH = 24


class Progress:
    """Context manager for one stage.

    show: (metric key, short label, format spec) of the figures to display, most important first: on a narrow
    screen the last ones are left out. `clock` in seconds; `console` (a rich Console, drawn on as it is) and
    `lines` (a text file for plain lines) replace the choice described above.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        show: Sequence[tuple[str, str, str]] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
        lines: IO[str] | None = None,
    ):
        self.stage, self.total = stage, total
        self._show = tuple(show)
        self._clock, self._console, self._lines = clock, console, lines
        self._live: Live | None = None
        self._step = 0
        self._figures: dict[str, str] = {}
        self._widths: dict[str, int] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._started = clock()
        self._printed: tuple[float, int] | None = None  # when and at which step the last plain line came
        self._end = ""

    def __enter__(self) -> Progress:
        self._started = self._clock()
        if self._console is None and self._lines is None and _terminal():
            from rich.console import Console

            self._console = Console(stderr=True)
        if self._console is not None:
            from rich.live import Live

            # rich redirects stdout and stderr while it draws: warnings and prints land above the bar
            self._live = Live(self, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._end:
            return
        self._end = "done" if kind is None else "stopped"
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._printed is not None and (self._printed[1] != self._step or self._times()[1] != "done"):
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, object]) -> None:
        """`step` steps are done; keys that `metrics` lacks keep the figure they had."""
        now = self._clock()
        if not self._marks:
            # where this session began: one step before its first, also for a resumed run
            self._marks.append((self._started, step - 1))
        self._marks.append((now, step))
        self._step = step
        for key, label, spec in self._show:
            if key in metrics:
                figure = _format(metrics[key], spec)
                self._figures[label] = figure
                self._widths[label] = max(self._widths.get(label, 0), len(figure))  # columns that do not jump
        if self._live is None and self._due(now):
            self._print_line()

    def finish(self) -> None:
        """All steps are done, though the stage is not: what follows may show a progress of its own."""
        self.__exit__(None, None, None)

    def note(self, text: str) -> None:
        """A line of text above the bar."""
        if self._live is not None and self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._lines or sys.stdout, flush=True)

    def _due(self, now: float) -> bool:
        if self._printed is None or (self._step >= self.total and self._printed[1] != self._step):
            return True
        return now - self._printed[0] >= LINE_SECONDS

    def _print_line(self) -> None:
        self._printed = (self._clock(), self._step)
        parts = [f"{self.stage} {self._count()}"]
        parts += [f"{label} {self._figures[label]}" for _, label, _ in self._show if label in self._figures]
        parts += [*self._times()]
        print("  ".join(parts), file=self._lines or sys.stdout, flush=True)

    def _count(self) -> str:
        return f"{self._step:>{len(str(self.total))}}/{self.total}"

    def _times(self) -> tuple[str, str]:
        elapsed = duration(self._clock() - self._started)
        if self._end == "stopped" or (self._end and self._step < self.total):
            return elapsed, "stopped" if self._end == "stopped" else "ended"
        if self._step >= self.total:
            return elapsed, "done"
        return elapsed, f"eta {duration(self._remaining())}"

    def _remaining(self) -> float:
        """Seconds, by the pace of the last steps; nan before the first."""
        if len(self._marks) < 2:
            return math.nan
        (then, first), (now, last) = self._marks[0], self._marks[-1]
        if last <= first:
            return math.nan
        pace = (now - then) / (last - first)
        return max(0.0, pace * (self.total - last) - (self._clock() - now))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line of what fits: the bar shrinks first, then figures go from the right, then the times."""
        from rich.text import Text

        head = [(f"{self.stage} ", "bold cyan"), (self._count(), "bold")]
        shown = [label for _, label, _ in self._show]
        elapsed, rest = self._times()
        tail = [(f"  {elapsed}", "dim"), (f"  {rest}", {"done": "green", "stopped": "red"}.get(rest, "dim"))]
        room = options.max_width - 1  # some terminals wrap when the last column is written
        for figures, bar, ending in _layouts(len(shown)):
            pieces = [*head]
            if bar:
                pieces += [("  ", ""), *_bar(self._step, self.total, bar, console)]
            for label in shown[:figures]:
                value = self._figures.get(label, "-").rjust(self._widths.get(label, 1))
                pieces += [(f"  {label} ", "dim"), (value, "red" if "nan" in value or "inf" in value else "")]
            pieces += tail[: 2 if ending else 0]
            line = Text.assemble(*pieces, no_wrap=True, end="")
            if line.cell_len <= room:
                break
        line.truncate(max(room, 1))
        yield line


def _layouts(figures: int) -> list[tuple[int, int, bool]]:
    """What a line may hold (figures, bar width, times), from the richest to the poorest."""
    return [
        *((n, bar, True) for n in range(figures, -1, -1) for bar in (BAR_WIDTH, 16, 10, 0)),
        (0, 0, False),
    ]


def _bar(step: int, total: int, width: int, console: Console) -> list[tuple[str, str]]:
    """`width` cells: what is done and what is not."""
    sign, half, rest = ("━", "╸", "─") if "utf" in console.encoding.lower() else ("#", "", "-")
    share = min(max(step / total, 0.0), 1.0) if total > 0 else 1.0
    done = int(share * width)
    part = half if share * width - done >= 0.5 else ""
    color = "green" if share == 1.0 else "cyan"
    return [(sign * done + part, color), (rest * (width - done - len(part)), "grey30")]


def _format(value: object, spec: str) -> str:
    if isinstance(value, str):
        return value
    try:
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number):
            return str(number)
        return format(int(number) if spec.endswith("d") else number, spec)
    except (TypeError, ValueError, RuntimeError):
        return str(value)[:20]


def duration(seconds: float) -> str:
    """7.4 -> 0:07, 3671 -> 1:01:11, nan -> -:--."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _terminal() -> bool:
    """Whether a line that is drawn again and again would be seen as such."""
    try:
        both = sys.stdout.isatty() and sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
    return both and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
