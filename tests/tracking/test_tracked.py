"""How a run ends: in process with a tracker that remembers, and as real processes on a real store."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.errors import Interrupted
from rlhf_exp.tracking import NullTracker, tracked
from rlhf_exp.tracking.tracker import describe


class Remembers(NullTracker):
    def __init__(self) -> None:
        self.ends: list[tuple[str, BaseException | str | None]] = []

    def finish(self, status: str, error: BaseException | str | None = None) -> None:
        self.ends.append((status, error))


def test_a_block_that_ends_well() -> None:
    tracker = Remembers()
    with tracked(tracker) as inside:
        assert inside is tracker
        assert tracker.ends == []
    assert tracker.ends == [("FINISHED", None)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), Interrupted("SIGTERM")])
def test_killed(error: BaseException) -> None:
    tracker = Remembers()
    with pytest.raises(type(error)) as caught, tracked(tracker):
        raise error
    assert caught.value is error
    assert tracker.ends == [("KILLED", None)]


@pytest.mark.parametrize("error", [ValueError("x"), MemoryError(), AssertionError()])
def test_failed(error: BaseException) -> None:
    tracker = Remembers()
    with pytest.raises(type(error)) as caught, tracked(tracker):
        raise error
    assert caught.value is error
    assert tracker.ends == [("FAILED", error)]


def test_describe() -> None:
    try:
        raise ValueError("loss is nan\nat step 3")
    except ValueError as error:
        line, text = describe(error)
    assert line == "ValueError: loss is nan"
    assert text.startswith("Traceback") and "test_tracked.py" in text and text.endswith("at step 3\n")
    assert describe(KeyError())[0] == "KeyError: "
    assert describe("Traceback ...\nOSError: disk full\n")[0] == "OSError: disk full"


SCRIPT = """
import sys, time
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import open_tracker, tracked

def train(tracker):
    tracker.metrics({"loss": 0.5}, 1)
    print(tracker.run_id, flush=True)
    if sys.argv[2] == "raise":
        raise ValueError("the loss is nan")
    while True:
        time.sleep(0.05)

with tracked(open_tracker(Tracking(), sys.argv[1], "ppo")) as tracker:
    train(tracker)
"""


def test_processes_that_are_interrupted_and_that_raise(output_dir: Path, store, tmp_path: Path) -> None:
    processes = {
        way: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(output_dir), way],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for way in ("wait", "raise")
    }
    ids = {way: process.stdout.readline().strip() for way, process in processes.items()}
    time.sleep(0.2)
    processes["wait"].send_signal(signal.SIGINT)
    errors = {way: process.communicate(timeout=60)[1] for way, process in processes.items()}

    killed, failed = store.run(ids["wait"]), store.run(ids["raise"])
    assert killed.info.status == "KILLED" and killed.info.end_time
    assert killed.data.metrics == {"loss": 0.5}  # was still buffered
    assert "KeyboardInterrupt" in errors["wait"]  # goes on to the caller
    assert processes["wait"].returncode in (-signal.SIGINT, 130)

    assert failed.info.status == "FAILED"
    assert failed.data.metrics == {"loss": 0.5}
    assert failed.data.tags["rlhf_exp.error"] == "ValueError: the loss is nan"
    trace = store.artifact(ids["raise"], "traceback.txt", tmp_path / "read")
    assert "in train" in trace and trace.endswith("ValueError: the loss is nan\n")
    assert trace.splitlines()[-1] in errors["raise"]
    assert processes["raise"].returncode == 1
