"""How a trial ended whose process could not say so itself: killed by a signal, or out of memory."""

from __future__ import annotations

import signal
from pathlib import Path

from rlhf_exp.errors import EXIT_INTERRUPTED

VMSTAT = Path("/proc/vmstat")


def oom_kills(path: Path = VMSTAT) -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where that is not said."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def reason(code: int, more_oom_kills: bool, log: Path) -> str:
    """In one line. code: as subprocess has it, -9 for SIGKILL."""
    if code < 0:
        name = _name(-code)
        if -code == signal.SIGKILL and more_oom_kills:
            return (
                "killed for memory (SIGKILL by the kernel): fewer hydra.launcher.workers, or a smaller batch"
            )
        if -code == signal.SIGKILL:
            return "killed by SIGKILL"
        return f"killed by {name}"
    if code == EXIT_INTERRUPTED:
        return "stopped by a signal"
    said = _last(log)
    return f"its process ended with exit code {code}" + (f": {said}" if said else "")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last(log: Path) -> str:
    """The last line of a log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
