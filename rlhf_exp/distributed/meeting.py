"""How the ranks of a run meet, and who of them speaks."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from datetime import timedelta
from typing import NoReturn

from rlhf_exp.distributed.identity import is_main, name, place, take, world_size
from rlhf_exp.errors import InputError

MEETING = timedelta(minutes=5)  # for all ranks to come
# nothing is judged by the time it takes: a rank may write or upload for an hour while the others wait. A rank that is
# gone is noticed by strategies/watch.py
PATIENCE = timedelta(days=2)

_started = False


def start() -> None:
    """Meet the other ranks; alone, or the second time, nothing happens. InputError where they do not come.

    On CUDA each rank takes the device of its local number. Ranks that share one talk by gloo, since NCCL refuses.
    """
    global _started
    if world_size() == 1 or _started:
        take()
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if devices := torch.cuda.device_count():
        torch.cuda.set_device(place().local % devices)
        if int(os.environ.get("LOCAL_WORLD_SIZE") or 1) <= devices:
            backend = "cpu:gloo,cuda:nccl"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        distributed.init_process_group(backend, timeout=MEETING)
        distributed.barrier()
    # torch's errors of its store and its sockets are RuntimeErrors
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name()}: the {world_size()} ranks did not meet at {address} within "
            f"{MEETING.total_seconds():.0f} s: {reason}"
        ) from error
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(PATIENCE)
    take()
    _started = True


def part() -> None:
    """The end of the group, before the interpreter's: nothing is under way between ranks any more."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with an exit code, after the threads and exit handlers that sys.exit waits for.

    Of several ranks without taking the interpreter apart: gloo's threads outlive their group and free what they hold
    a moment later. Where they find no interpreter then, the process dies by SIGABRT, and a run that is done looks
    like one that failed. multiprocessing ends its processes in the same way.
    """
    if not _started:
        sys.exit(code)
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start_alone() -> None:
    """A group of this process only, which DeepSpeed needs where there are no other ranks."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        atexit.register(part)


def silence() -> None:
    """Ranks but 0 print nothing: what they would say, rank 0 says."""
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
