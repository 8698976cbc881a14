"""python builder.py OUTPUTS KEY [fork]: build or reuse one artifact, as a stage does; prints which.

It starts at a line on stdin, and ends a build at another.
"""

from __future__ import annotations

import os
import sys
import time

from rlhf_exp.store.locks import build_lock
from rlhf_exp.store.runs import find, run_folder


def say(*words: object) -> None:
    print(*words, flush=True)


def main(outputs: str, key: str, fork: str = "") -> None:
    folder = run_folder(outputs, "sft", key)
    say("ready", os.getpid())
    sys.stdin.readline()
    with build_lock(folder.path, lambda line: say("wait", line)):
        if find(outputs, "sft", key):
            say("reused")
            return
        folder.start({})
        with open(f"{outputs}/builds", "a") as counter:
            counter.write(f"{os.getpid()}\n")
        if fork and os.fork() == 0:  # a data loader's worker, which outlives its parent
            time.sleep(60)
            os._exit(0)
        say("building")
        with folder.publish("adapter") as files:
            (files / "weights").write_text("half")
            sys.stdin.readline()
            (files / "weights").write_text("whole")
        folder.finish({"loss": 0.5})
        say("built")


if __name__ == "__main__":
    main(*sys.argv[1:])
