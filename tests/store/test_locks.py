"""Two processes never build the same artifact; a dead one holds nothing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_exp.store import locks
from rlhf_exp.store.locks import build_lock, is_held
from rlhf_exp.store.runs import find, run_folder

KEY = "3f" * 32


def builder(outputs: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(Path(__file__).with_name("builder.py")), str(outputs), KEY, *more]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def go(process: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):  # one that waited may have seen the result and gone
        process.stdin.write("\n")
        process.stdin.flush()


def test_four_processes_at_once_build_once(outputs):
    processes = [builder(outputs) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout.readline().split()[0] == "ready"
        for process in processes:
            go(process)
        said = [[process.stdout.readline().strip()] for process in processes]  # building, or waiting for it
        for process in processes:
            go(process)
        for process, lines in zip(processes, said, strict=True):
            lines += process.communicate(timeout=60)[0].splitlines()
    finally:
        for process in processes:
            process.kill()
    (pid,) = (outputs / "builds").read_text().split()
    assert sorted(lines[-1] for lines in said) == ["built", "reused", "reused", "reused"]
    assert find(outputs, "sft", KEY).read()["metrics"] == {"loss": 0.5}
    for lines in said:
        waits = [line for line in lines if line.startswith("wait")]
        if lines[-1] == "built":
            assert lines == ["building", "built"]
        else:
            host = re.escape(socket.gethostname())
            pattern = rf"wait waiting for sft 3f3f3f3f3f3f: process {pid} on {host} \(since .*"
            assert len(waits) == 1 and re.fullmatch(pattern, waits[0])


@pytest.mark.parametrize("fork", ["", "fork"], ids=["alone", "with a child that lives on"])
def test_the_lock_of_a_killed_builder_is_free_at_once(outputs, fork):
    process = builder(outputs, fork)
    try:
        process.stdout.readline()
        go(process)
        assert process.stdout.readline() == "building\n"
        path = run_folder(outputs, "sft", KEY).path
        assert is_held(path)
        process.kill()
        process.wait()
        lines = []
        with build_lock(path, lines.append, timeout=10):
            assert lines == []
            # what the dead one was writing is gone
            assert sorted(p.name for p in path.iterdir()) == ["run.json"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert not is_held(path)


def test_is_held_and_try_once(outputs, monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 60)
    path = run_folder(outputs, "sft", KEY).path
    assert not is_held(path)
    with build_lock(path):
        assert is_held(path)
        assert locks.holder(path)["pid"] == os.getpid()
        begin = time.monotonic()
        with pytest.raises(TimeoutError), build_lock(path, timeout=0):
            pass
        assert time.monotonic() - begin < 10
    assert not is_held(path) and locks.holder(path) is None


def test_different_runs_do_not_wait_for_each_other(outputs):
    one, two = (run_folder(outputs, "sft", KEY, "never").path for _ in range(2))
    with build_lock(one), build_lock(two, timeout=0):
        assert is_held(one) and is_held(two)


def test_an_exception_gives_the_lock_back(outputs):
    path = run_folder(outputs, "sft", KEY).path
    with pytest.raises(ZeroDivisionError), build_lock(path):
        _ = 1 / 0
    assert not is_held(path)


def test_the_line_does_not_name_a_dead_process(outputs):
    """A killed builder's signature stays; whoever got the lock after it may not have signed yet."""
    path = run_folder(outputs, "sft", KEY).path
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lines = []
    with build_lock(path):
        host = socket.gethostname()
        locks._holder_path(path).write_text(f'{{"pid": {dead.pid}, "host": "{host}", "since": "x"}}')
        waiter = threading.Thread(target=lambda: build_lock(path, lines.append).__enter__(), daemon=True)
        waiter.start()
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.02)
    waiter.join(10)
    assert lines == ["waiting for sft 3f3f3f3f3f3f: another process is building it"]
