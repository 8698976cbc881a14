"""Processes of trials: what they are given, how they end, signals, and that none is left behind.

The sweep's frozen code holds another _child.py here: a trial in a few lines, which reads what to do from its folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra_plugins.rlhf_local_pool import _lost
from hydra_plugins.rlhf_local_pool._pool import Job, Pool
from hydra_plugins.rlhf_local_pool._share import Share
from hydra_plugins.rlhf_local_pool._view import View

from rlhf_exp.errors import Interrupted
from rlhf_exp.sweeps import ledger

ROOT = Path(__file__).resolve().parents[2]
# does what the file `do` in its folder says, between the ledger's `started` and `ended`
TRIAL = """
import json, os, signal, sys, time
from pathlib import Path
from hydra_plugins.rlhf_local_pool import _child
_child.start(int(sys.argv[1]))
from rlhf_exp.sweeps import ledger
folder = Path(sys.argv[2])
number = int(folder.name)
(folder / "environ").write_text(json.dumps(dict(os.environ)))
(folder / "pid").write_text(str(os.getpid()))
ledger.append(folder.parent, "started", number=number)
try:
    exec((folder / "do").read_text())
except InterruptedError:
    ledger.append(folder.parent, "ended", number=number, status="interrupted", reason="stopped by SIGTERM")
    sys.exit(75)
except Exception as error:
    ledger.append(folder.parent, "ended", number=number, status="failed", reason=repr(error))
    sys.exit(1)
ledger.append(folder.parent, "ended", number=number, status="done", objective=float(number))
"""
SAVES = """
def stop(*_): raise InterruptedError
signal.signal(signal.SIGTERM, stop)
print("ppo  3/10  score 0.50  0:07  eta 0:16", flush=True)
(folder / "ready").touch()
time.sleep(60)
"""


def sweep_of(path, tasks):
    """A sweep's folder with a trial for each task."""
    stub = path / "code" / "launchers" / "hydra_plugins" / "rlhf_local_pool" / "_child.py"
    stub.parent.mkdir(parents=True)
    stub.write_text(TRIAL)
    jobs = []
    for number, task in enumerate(tasks):
        folder = path / str(number)
        folder.mkdir()
        (folder / "do").write_text(task)
        ledger.append(path, ledger.TRIAL, number=number, overrides=[f"a={number}"])
        jobs.append(Job(number, [f"a={number}"], folder))
    return jobs


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The stub needs the plugin that it replaces, for what it does not."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'launchers'}")
    return tmp_path / "sweep"


def run(jobs, shares, **settings):
    """Run them; returns the numbers in the order of their ends, and the exit codes."""
    ended = []
    with View(len(jobs)) as view:
        Pool(shares, view, **settings).run(jobs, lambda job, code: ended.append((job.number, code)))
    return ended


def status(sweep):
    return {number: (state.status, state.reason) for number, state in ledger.states(sweep).items()}


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_trial_has_a_share_of_its_own(sweep):
    """While a trial runs it holds a lock on its devices: two with the same would meet."""
    task = (
        "taken = folder.parent / ('gpu' + os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "os.mkdir(taken)\ntime.sleep(0.3)\nos.rmdir(taken)"
    )
    jobs = sweep_of(sweep, [task] * 5)
    shares = [Share(("0", "1"), 3), Share(("2", "3"), 3)]
    ended = run(jobs, shares, environment={"NCCL_DEBUG": "WARN"})
    assert sorted(ended) == [(n, 0) for n in range(5)]
    assert all(state == ("done", "") for state in status(sweep).values())
    environments = [json.loads((job.folder / "environ").read_text()) for job in jobs]
    assert {e["CUDA_VISIBLE_DEVICES"] for e in environments} == {"0,1", "2,3"}
    assert {e["OMP_NUM_THREADS"] for e in environments} == {"3"}
    assert {e["NCCL_DEBUG"] for e in environments} == {"WARN"}
    code = [str((sweep / "code").absolute()), str((sweep / "code" / "launchers").absolute())]
    assert all(e["PYTHONPATH"].split(":")[:2] == code for e in environments), "the sweep's frozen code"


def test_whatever_becomes_of_a_trial_the_others_run(sweep, monkeypatch):
    counts = iter(
        [5, 5, 5, 5, 6, 6, 6, 6]
    )  # asked at each start and each loss: one more when trial 2 is lost
    monkeypatch.setattr(_lost, "oom_kills", lambda: next(counts))
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    tasks = ["raise ValueError('x')", kill, kill, "print('no space left', flush=True); os._exit(3)", "pass"]
    jobs = sweep_of(sweep, tasks)
    assert run(jobs, [Share((), 1)]) == [(0, 1), (1, -9), (2, -9), (3, 3), (4, 0)]
    assert status(sweep) == {
        0: ("failed", "ValueError('x')"),
        1: ("failed", "killed by SIGKILL"),
        2: (
            "failed",
            "killed for memory (SIGKILL by the kernel): fewer hydra.launcher.workers, or a smaller batch",
        ),
        3: ("failed", "its process ended with exit code 3: no space left"),
        4: ("done", ""),
    }
    assert "no space left" in (jobs[3].folder / "log.txt").read_text()


def test_what_a_trial_leaves_behind_is_ended_with_it(sweep):
    task = (
        "import subprocess\np = subprocess.Popen(['sleep', '60'])\n(folder / 'left').write_text(str(p.pid))"
    )
    (job,) = sweep_of(sweep, [task])
    run([job], [Share((), 1)])
    pid = int((job.folder / "left").read_text())
    wait_for(lambda: not alive(pid), 5)


PARENT = """
import sys
from pathlib import Path
from hydra_plugins.rlhf_local_pool._pool import Job, Pool
from hydra_plugins.rlhf_local_pool._share import Share
from hydra_plugins.rlhf_local_pool._view import View
from rlhf_exp.errors import Interrupted
sweep = Path(sys.argv[1])
jobs = [Job(number, [], sweep / str(number)) for number in range(3)]
try:
    with View(3) as view:
        Pool([Share((), 1)] * 2, view).run(jobs, lambda job, code: None)
except Interrupted as error:
    print(error)
    sys.exit(75)
"""


def parent(sweep):
    """The pool in a process of its own, with two of three trials running."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(sweep)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: all((sweep / str(n) / "ready").exists() for n in (0, 1)))
    return process, [int((sweep / str(n) / "pid").read_text()) for n in (0, 1)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_trials_save(sweep, number):
    sweep_of(sweep, [SAVES] * 3)
    process, pids = parent(sweep)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert f"{number.name}: saving, then stopping (trials 0, 1)" in out
    assert out.splitlines()[-1] == f"stopped by {number.name}"
    assert not any(map(alive, pids))
    saved = ("interrupted", "stopped by SIGTERM")
    assert status(sweep) == {0: saved, 1: saved, 2: ("waiting", "")}


def test_a_trial_that_does_not_listen_is_killed_by_the_third_signal(sweep):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / 'ready').touch()\ntime.sleep(60)"
    sweep_of(sweep, [deaf] * 3)
    process, pids = parent(sweep)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert not any(map(alive, pids))
    assert status(sweep)[0] == ("interrupted", "killed by SIGKILL")


def test_after_the_grace_they_are_killed(sweep):
    deaf = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    )
    jobs = sweep_of(sweep, [deaf])
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(jobs, [Share((), 1)], grace=0.3)
    assert status(sweep)[0] == ("interrupted", "killed by SIGKILL")


def test_a_launcher_that_is_killed_leaves_no_orphans(sweep):
    sweep_of(sweep, [SAVES] * 3)
    process, pids = parent(sweep)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not any(map(alive, pids)), 20)
    saved = ("interrupted", "stopped by SIGTERM")
    assert status(sweep) == {0: saved, 1: saved, 2: ("waiting", "")}, "they saved, as by a signal"


def test_an_orphan_that_does_not_listen_is_killed(tmp_path):
    code = (
        "import signal, sys, time; from hydra_plugins.rlhf_local_pool import _child\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n_child.start(int(sys.argv[1]), 0.2)\ntime.sleep(60)"
    )
    read, write = os.pipe()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'launchers'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(read)], pass_fds=[read], env=environment, start_new_session=True
    )
    os.close(read)
    time.sleep(0.5)
    assert process.poll() is None
    os.close(write)
    assert process.wait(20) == -9


def test_a_trial_that_another_process_runs_is_waited_for(sweep, monkeypatch):
    """An orphan of an earlier launcher still saves: its trial comes when it is done, the next one meanwhile."""
    from hydra_plugins.rlhf_local_pool import _pool

    jobs = sweep_of(sweep, ["pass", "pass"])
    busy = [True]
    monkeypatch.setattr(_pool.trials, "is_running", lambda folder: folder.name == "0" and busy[0])

    def ended(job, code):
        busy[0] = False
        order.append(job.number)

    order = []
    with View(2) as view:
        Pool([Share((), 1)], view).run(jobs, ended)
    assert order == [1, 0]
