"""One builder at a time for each run folder.

The lock is an flock (filelock) on <stage folder>/.locks/<run>.lock. The kernel drops it when its process
ends, however it ends, so that a killed builder blocks nobody and there is no timeout to tune. The file stays
where it is: deleting a file that others wait for would give them two locks.

NFS: flock holds between machines on NFSv4, and on NFSv3 with lockd, but not on mounts with `nolock` or
`local_lock=flock`; there two machines can build the same run at once (each publishes atomically, the last one
wins). When a machine crashes, an NFSv4 server frees its locks at the end of their lease, by default after 90
s. Where flock is missing altogether, filelock falls back to a marker file, and a marker that a crash on
another machine left must be deleted by hand.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_exp import distributed
from rlhf_exp.store import atomic
from rlhf_exp.store.runs import now

POLL = 0.2  # seconds between two looks at a lock that somebody else has
# seconds before a wait is worth a line: `is_held` takes the lock for a moment, a builder signs it a bit later
GRACE = 0.5


def hostname() -> str:
    return socket.gethostname()


def _lock_path(folder: Path) -> Path:
    folder = Path(folder).absolute()
    return folder.parent / ".locks" / f"{folder.name}.lock"


def _holder_path(folder: Path) -> Path:
    return _lock_path(folder).with_suffix(".json")


def holder(folder: str | Path) -> dict[str, Any] | None:
    """Who took the lock last and did not give it back: {"pid", "host", "since"}; perhaps dead (`is_held`)."""
    try:
        found = json.loads(_holder_path(Path(folder)).read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "since": str(found["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_held(folder: str | Path) -> bool:
    """Whether a living process builds this run now."""
    from filelock import FileLock, Timeout

    path = _lock_path(Path(folder))
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _is_dead(who: dict[str, Any]) -> bool:
    if who["host"] != hostname():
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _waiting(folder: Path) -> str:
    who = holder(folder)
    by = "another process"
    # a dead one was killed and left its signature; who has the lock now has not signed yet
    if who and not _is_dead(who):
        by = f"process {who['pid']} on {who['host']} (since {who['since'][:19]} UTC)"
    return f"waiting for {folder.parent.name} {folder.name}: {by} is building it"


@contextmanager
def build_lock(
    folder_path: str | Path,
    on_wait: Callable[[str], None] | None = None,
    timeout: float = -1,
    every_rank: bool = False,
) -> Iterator[None]:
    """Hold the right to build a run folder, and repair what a killed builder left in it.

    While another process has it, `on_wait` gets one line that names the process and its host, once. Look with
    `find` after the wait: the other has probably finished the run. `timeout` in seconds (negative: no limit;
    0: one try) ends in TimeoutError. Of several ranks rank 0 has it for all; every_rank: each asks for itself, for
    what each may have to build.
    """
    from filelock import FileLock, Timeout

    if not (every_rank or distributed.is_main()):
        yield
        return
    folder = Path(folder_path).absolute()
    _lock_path(folder).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(_lock_path(folder))
    try:
        lock.acquire(timeout=GRACE if timeout < 0 else min(GRACE, timeout))
    except Timeout:
        if 0 <= timeout <= GRACE:
            raise
        if on_wait:
            on_wait(_waiting(folder))
        lock.acquire(timeout=timeout, poll_interval=POLL)
    try:
        who = {"pid": os.getpid(), "host": hostname(), "since": now()}
        atomic.write_bytes(_holder_path(folder), json.dumps(who).encode())
        atomic.repair(folder)
        yield
    finally:
        _holder_path(folder).unlink(missing_ok=True)
        lock.release()
