"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (what batch systems send before the end) and Ctrl-C.

Inside `deferred` (the loop of a stage that can save) the first one only sets a flag, which the loop looks at after
each step; a second one, and any outside, ends the run at once: what was saved before is where it goes on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_exp.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_asked: list[int] = []  # signals that came inside `deferred`, in order
_depth = 0  # of `deferred`


def asked() -> str | None:
    """The name of the signal that asks the loop to save and stop; None: go on."""
    return signal.Signals(_asked[0]).name if _asked else None


@contextmanager
def listening() -> Iterator[None]:
    """Take the signals inside; handlers are as before afterwards. Outside the main thread nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # a job in the background is not meant by Ctrl-C
            signal.signal(number, _take)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


@contextmanager
def deferred() -> Iterator[None]:
    """The first signal sets the flag that `asked` shows."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def _take(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _depth and not _asked:
        _asked.append(number)
        # not print: the signal may have come inside one
        os.write(2, f"{name}: saving after this step, then stopping; once more stops at once\n".encode())
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(f"stopped by {name} at once; the same command continues")
