"""python killer.py ACTION FOLDER: run an action in forked children, each killed (SIGKILL) at another step.

A step is a change or a flush of the disk: rename, replace, fsync, mkdir, unlink, rmdir, or half of a write.
Child k works in FOLDER/k, a copy of FOLDER/start, and dies before step k; the first child that survives ends
the series. Prints the number of children.
"""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import sys
from pathlib import Path

from rlhf_exp.store import atomic
from rlhf_exp.store.runs import RunFolder

STEPS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")


class Countdown:
    def __init__(self, step: int):
        self.left = step

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def arm(countdown: Countdown) -> None:
    def wrap(call):
        def counted(*args, **kwargs):
            countdown()
            return call(*args, **kwargs)

        return counted

    os.fsync = lambda descriptor: None  # a kill is no power cut: the flush counts as a step but takes no time
    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))

    def half_open(path, mode):
        file = builtins.open(path, mode, buffering=0)  # noqa: SIM115  (Halves closes it)

        class Halves:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, content):
                file.write(content[: len(content) // 2])
                countdown()
                file.write(content[len(content) // 2 :])

            flush, fileno = file.flush, file.fileno

        return Halves()

    atomic.open = half_open


def publish(folder: Path, countdown: Countdown) -> None:
    with RunFolder(folder).publish("adapter") as files:
        for name in ("a", "b", "c"):
            (files / name).write_text("new")
            countdown()


ACTIONS = {
    "publish": publish,
    "update": lambda folder, _: RunFolder(folder).update(mlflow_run_id="new"),
    "finish": lambda folder, _: RunFolder(folder).finish({"loss": 0.25}),
    "fail": lambda folder, _: RunFolder(folder).fail("FAILED", "ValueError"),
    "discard": lambda folder, _: RunFolder(folder).discard("adapter"),
    "repair": lambda folder, _: atomic.repair(folder),
}


def main(action: str, root: Path) -> int:
    for step in range(1, 200):
        folder = root / str(step)
        shutil.copytree(root / "start", folder)
        child = os.fork()
        if child == 0:
            countdown = Countdown(step)
            arm(countdown)
            ACTIONS[action](folder, countdown)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "the action failed"
            return step
    raise AssertionError("the action never ends")


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2])))
