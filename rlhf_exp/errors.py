"""The errors a user can cause, and the exit codes of the command line (0 done, 1 anything else)."""

from __future__ import annotations

from collections.abc import Iterable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved and stopped by a signal, the same command continues


class InputError(Exception):
    """Bad input, found before anything expensive starts.

    `problems` holds one line each: what is wrong, where, and what to do about it. The command line prints them as
    `error: <line>` and exits with code 2; inside a sweep the trial fails and the others go on.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Interrupted(BaseException):
    """A signal asked the run to stop (exit code 75); the text says which, and where the same command goes on.

    Not an Exception, as KeyboardInterrupt is none: nobody who expects trouble of another kind may swallow it.
    """


class Pruned(Interrupted):
    """A trial of a sweep that was ended early, after saving; without the rule that ended it, it would go on."""
