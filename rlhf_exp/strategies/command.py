"""A command on several ranks: they meet before it, and end together after it, with one line that says why."""

from __future__ import annotations

import atexit
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rlhf_exp import distributed
from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted
from rlhf_exp.strategies.watch import FAILED, Watch

WORD = 2.0  # seconds
_inside = False
_ending = False  # something has ended the command: a signal now adds nothing to it
_parted = False  # a rank has ended by itself: another may still wait for it in a sum
_watch: Watch | None = None  # from the first command of the process on


class Lost(Exception):
    """Another rank ended, so this one does; rank 0 has told people. `code`: of the process."""

    def __init__(self, code: int, lines: Sequence[str] = ()):
        super().__init__("; ".join(lines))
        self.code = code


@contextmanager
def together() -> Iterator[None]:
    """What runs in this block runs on every rank.

    Errors that all ranks have agreed on pass as they are. Of any other the other ranks are told; where it is only the
    echo of another rank's end, or not rank 0's, whose task it is to say it, Lost is raised in its place. A block in
    such a block is part of it.

    torchrun sends SIGTERM to all ranks a moment after one is gone. So SIGTERM is taken from the meeting on, and what
    it ends first listens for the end of another rank: that is the reason then.
    """
    global _watch, _inside, _ending, _parted
    if distributed.world_size() == 1 or _inside:
        distributed.start()
        yield
        return
    if _watch is None:
        distributed.start()
        distributed.silence()
        _watch = Watch()
        _watch.begin()
        atexit.register(_leave)
    _inside, _ending = True, False
    with _taking_sigterm():
        try:
            yield
            distributed.barrier()
        except InputError as error:
            _ending = True
            _tell(error, EXIT_BAD_INPUT, error.problems)
            raise
        except Interrupted as error:
            _ending = True
            _interrupted(error)
            raise
        except Exception as error:
            _ending = True
            _tell(error, FAILED, [f"{type(error).__name__}: {error}".partition("\n")[0]])
            raise
        except BaseException as error:  # Ctrl-C, or a library that ends the process
            _ending = _parted = True
            _watch.leave(FAILED, [f"stopped by {type(error).__name__}"])
            raise
        finally:
            _inside = False


@contextmanager
def _taking_sigterm() -> Iterator[None]:
    """SIGTERM raises Interrupted; signals.listening, around the stages, takes its place. No other thread may ask."""
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTERM, _take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _take(number: int, frame: FrameType | None) -> None:
    if not _ending:
        raise Interrupted(f"stopped by {signal.Signals(number).name} at once; the same command continues")


def _interrupted(error: Interrupted) -> None:
    """A signal ends this rank. Raises Lost where another rank's end is behind it, of which rank 0 tells people.

    Where all ranks stop, each hears it of another at once; nobody waits.
    """
    global _parted
    _watch.leave(EXIT_INTERRUPTED, [str(error)])
    end = _watch.heard(WORD)
    if end is not None and end.code == EXIT_INTERRUPTED:
        return
    _parted = True
    if end is not None:
        _watch.say(end)
        raise Lost(end.exit_code, end.told()) from error


def _tell(error: Exception, code: int, lines: Sequence[str]) -> None:
    """Of an error that ends this rank. Raises Lost where it is not this rank that people hear of it from."""
    global _parted
    if getattr(error, "agreed", False):
        if not distributed.is_main():
            raise Lost(code) from error
        return
    _parted = True
    # a sum that fails comes a moment before the word of the rank that is behind it
    end = _watch.heard(0.0 if distributed.is_main() and code == EXIT_BAD_INPUT else WORD)
    if end is not None:
        _watch.leave(end.exit_code, [])
        _watch.say(end)
        raise Lost(end.exit_code, end.told()) from error
    if (
        not distributed.is_main() and code == FAILED
    ):  # rank 0 says it in a line; where it came from is only here
        traceback.print_exception(error)
    _watch.leave(code, list(lines))
    if not distributed.is_main():
        raise Lost(code) from error


def _leave() -> None:
    """The process ends well, or has said why not: the others do not take it for gone."""
    _watch.leave(0, [])
    if not _parted:
        distributed.part()
