"""What a stage may say to a tracker, and how a run ends."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rlhf_exp.errors import Interrupted


class Tracker(Protocol):
    """One run. No method raises because the store is in trouble."""

    run_id: str | None

    def params(self, values: Mapping[str, object]) -> None:
        """Record a configuration; nested mappings become dotted keys."""

    def metrics(self, values: Mapping[str, object], step: int) -> None:
        """Record numbers (also 0-dimensional tensors) of one step; nan and inf are numbers too."""

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags; a later value replaces an earlier one."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Store a copy of a file, or of a folder's content, under `folder`."""

    def table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Store rows as the table `name`, in place of an earlier table of that name."""

    def child(
        self, name: str, tags: Mapping[str, object] | None = None, run_id: str | None = None
    ) -> Tracker:
        """Open a run under this one, or go on with the run `run_id`. The two end independently."""

    def settled(self) -> bool:
        """Whether the store has every number that it was given."""

    def flush(self) -> None:
        """Send what is buffered now."""

    def finish(self, status: str, error: BaseException | str | None = None) -> None:
        """Send everything and end the run as FINISHED, FAILED or KILLED; only the first call counts.

        `error`: the exception (or a traceback's text) behind a FAILED run; kept as traceback.txt.
        """


@contextmanager
def tracked(tracker: Tracker) -> Iterator[Tracker]:
    """End the run the way the block ends: FINISHED, KILLED (Ctrl-C, a signal) or FAILED; exceptions go on."""
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit, Interrupted):
        tracker.finish("KILLED")
        raise
    except BaseException as error:
        tracker.finish("FAILED", error)
        raise
    else:
        tracker.finish("FINISHED")


def describe(error: BaseException | str) -> tuple[str, str]:
    """One line about an error, and its full traceback."""
    if isinstance(error, str):
        lines = error.strip().splitlines() or [""]
        return lines[-1], error
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}", "".join(traceback.format_exception(error))
