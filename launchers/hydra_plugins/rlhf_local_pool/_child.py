"""The process of one trial: `python -P _child.py FD FOLDER`; it ends when the launcher is gone.

The launcher holds the other end of the pipe FD and never writes to it: when it dies, be it of SIGKILL, the pipe is
closed, and this process is asked to save and stop as by a signal. One that does not is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

GRACE = 600.0  # seconds


def watch(descriptor: int, grace: float) -> None:
    """Wait for the launcher's end; then ours."""
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def start(descriptor: int, grace: float = GRACE) -> None:
    threading.Thread(target=watch, args=(descriptor, grace), daemon=True).start()


if __name__ == "__main__":
    start(int(sys.argv[1]))
    from rlhf_exp.sweeps.trial import main

    sys.exit(main(sys.argv[2:]))
