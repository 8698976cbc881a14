"""How much memory there is, and the largest micro-batch that fits into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def of_host(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> float | None:
    """Bytes that this process can still have of the machine's memory, or of its container's; None: nobody says."""
    found = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(1024.0 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:  # a container's limit; pages of files that it has read can be taken back
        limit, used = (float((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        found.append(limit - used + float(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # "max": no limit
        pass
    return min(found, default=None)


def sizes(batch: int, whole: bool) -> list[int]:
    """Micro-batches of `batch` rows, largest first: those that divide it, or (not `whole`) all."""
    return [size for size in range(batch, 0, -1) if not whole or batch % size == 0]


def largest(candidates: Sequence[int], need: Callable[[int], float], room: float | None) -> int:
    """The first of `candidates`, which fall, whose need [bytes] is at most `room`; the last, if none is.

    None, nobody knows how much there is: the first.
    """
    return next((size for size in candidates if room is None or need(size) <= room), candidates[-1])


class OutOfMemory(Exception):
    """Not even one row fits."""


def tried(
    candidates: Sequence[int],
    attempt: Callable[[int], None],
    errors: type[BaseException] | tuple[type[BaseException], ...],
    recover: Callable[[], None] = lambda: None,
) -> int:
    """The first of `candidates`, which fall, that `attempt` gets through: after each of `errors` at most half is
    tried next. OutOfMemory where the last fails too.

    recover: called after a failure, when nothing of the attempt is held any more.
    """
    left = list(candidates)
    while left:
        size = left[0]
        if _passes(attempt, size, errors):
            return size
        recover()
        left = [other for other in left if other <= size // 2] or left[-1:] * (size != left[-1])
    raise OutOfMemory


def _passes(
    attempt: Callable[[int], None],
    size: int,
    errors: type[BaseException] | tuple[type[BaseException], ...],
) -> bool:
    """In a function of its own: the error holds the frames of the attempt, and their tensors, until it is gone."""
    try:
        attempt(size)
    except errors:
        return False
    return True


def named(sizes: Iterable[tuple[str, float]]) -> str:
    """`activations 1.20 GB, logits 300 MB`, the largest first."""
    from rlhf_exp.memory.table import gigabytes

    ordered = sorted(sizes, key=lambda pair: -pair[1])
    return ", ".join(f"{name} {gigabytes(value)}" for name, value in ordered)
