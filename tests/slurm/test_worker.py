"""What a job's task does with how its trial ended; the trial and SLURM are pretended."""

from __future__ import annotations

import signal
import subprocess
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from rlhf_exp.jobs import ranks, states, units, worker
from rlhf_exp.sweeps import ledger

RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}
PREEMPTED = RUNNING | {"PreemptTime": "2026-11-21T22:10:25"}


@pytest.fixture
def task(tmp_path, monkeypatch):
    """task(code, slurm, ...): run trial 0, which ends with this exit code; returns the task's exit code."""
    handlers = {number: signal.getsignal(number) for number in worker.ASKS}
    asked: list[list[str]] = []

    def make(
        codes,
        slurm,
        sent=(),
        restarts=0,
        max_requeues=5,
        reason="stopped by SIGUSR1 at step 3",
        says=True,
        pause=None,
    ):
        codes = iter(codes if isinstance(codes, list) else [codes])
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        monkeypatch.setenv("SLURM_JOB_ID", "123")
        monkeypatch.setattr(ranks, "apply", lambda: 0)
        monkeypatch.setattr(states, "details", lambda job: slurm)
        monkeypatch.setattr(worker.time, "sleep", pause or (lambda seconds: None))
        ledger.append(tmp_path, "trial", number=0, overrides=[])
        ledger.append(tmp_path, "submitted", number=0, stage="sft", job="7_0")
        found = worker.Task(tmp_path, "0", max_requeues)

        def work():
            found.asked += sent
            code = next(codes)
            if says:
                ledger.append(tmp_path, "started", number=0, host="n1", pid=1)
                status = {0: "done", 75: "interrupted"}.get(code, "failed")
                ledger.append(tmp_path, "ended", number=0, status=status, reason=reason)
            return code

        def scontrol(words, **_):
            asked.append(list(words))
            return subprocess.CompletedProcess(words, 0, "", "")

        monkeypatch.setattr(found, "work", work)
        monkeypatch.setattr(worker.subprocess, "run", scontrol)
        return found.run()

    yield SimpleNamespace(
        run=make, asked=asked, unit=lambda: units.read(tmp_path)["0"], events=lambda: ledger.read(tmp_path)
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("slurm", "sent", "requeued"),
    [
        (RUNNING, [signal.SIGUSR1], True),  # before the time limit, or preempted with a signal
        (PREEMPTED, [signal.SIGUSR1], True),
        (PREEMPTED, [signal.SIGTERM], True),  # preempted by a cluster that sends no other signal
        (RUNNING, [signal.SIGTERM], False),  # another task failed, or somebody killed it
        ({"JobState": "CANCELLED", "PreemptTime": "None"}, [signal.SIGTERM], False),
        ({"JobState": "CANCELLED", "PreemptTime": "None"}, [signal.SIGUSR1], False),
        ({"JobState": "PENDING", "PreemptTime": "None"}, [signal.SIGTERM], False),  # SLURM requeues it
        ({"JobState": "COMPLETING", "PreemptTime": "None"}, [signal.SIGUSR1, signal.SIGTERM], False),
        ({}, [signal.SIGUSR1], False),
    ],
)
def test_who_puts_an_interrupted_job_back(task, slurm, sent, requeued):
    assert task.run(75, slurm, sent) == 75
    assert task.asked == ([["scontrol", "requeue", "123"]] if requeued else [])
    assert [event["event"] for event in task.events()][-1] == ("requeued" if requeued else "ended")
    assert not task.unit().ended


def test_a_trial_that_was_killed_by_the_signal_itself_was_interrupted(task):
    """It had not begun to listen."""
    assert task.run(-signal.SIGUSR1, RUNNING, [signal.SIGUSR1], says=False) == 75
    assert task.events()[-1]["reason"] == "stopped by a signal before it began"
    assert task.asked


@pytest.mark.parametrize(
    ("left", "delay", "missed"),
    [(100, 120, True), (140, 120, False), (-5, 120, True), (None, 120, False)],
)
def test_a_signal_that_came_before_anybody_listened(task, monkeypatch, left, delay, missed):
    """The limit is near, or the job is being preempted: SLURM has asked, and will not ask again."""
    end = (
        "Unknown"
        if left is None
        else (datetime.now() + timedelta(seconds=left)).isoformat(timespec="seconds")
    )
    asked = []
    known = RUNNING | {"EndTime": end}
    original = worker.Task.has_missed_it

    def look(self):
        self.signal_delay = delay
        asked.append(original(self))
        return asked[-1]

    monkeypatch.setattr(worker.Task, "has_missed_it", look)
    assert task.run(75 if missed else 0, known) == (75 if missed else 0)
    assert asked == [missed]
    assert bool(task.asked) == missed  # put back


def test_the_last_start(task):
    assert task.run(75, RUNNING, [signal.SIGUSR1], restarts=2, max_requeues=2) == 1
    assert task.asked == []
    assert task.unit().reason == (
        "stopped by SIGUSR1 at step 3; not started again: hydra.launcher.max_requeues=2"
    )
    assert task.unit().ended


def test_one_start_too_many(task):
    """SLURM may put a job back by itself, whatever we think of it."""
    assert task.run(0, RUNNING, restarts=3, max_requeues=2) == 1
    assert task.unit().reason == "started for the 4th time: hydra.launcher.max_requeues=2"
    assert [event["event"] for event in task.events()] == ["trial", "submitted", "ended"]


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (1, "failed"), (2, "failed")])
def test_what_the_trial_said_stays(task, code, status):
    assert task.run(code, RUNNING, reason="its own words") == code
    assert (task.unit().status, task.unit().reason) == (status, "its own words")
    assert [event["event"] for event in task.events()].count("ended") == 1


@pytest.mark.parametrize(
    ("code", "exit_code", "said"), [(-9, 137, "SIGKILL"), (-11, 139, "signal 11"), (3, 3, "code 3")]
)
def test_what_the_trial_could_not_say_is_said_for_it(task, code, exit_code, said):
    assert task.run(code, RUNNING, says=False) == exit_code
    assert task.unit().status == "failed" and said in task.unit().reason
    assert task.events()[-1]["job"] == "123", "of which job, for a submission that is noted later"


def test_a_trial_that_an_old_process_still_has_is_waited_for(task, tmp_path):
    """A node was given up, and its process goes on: the new one finds the trial taken, until that has ended."""
    waits: list[float] = []

    def pause(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            ledger.append(tmp_path, "ended", number=0, status="done", objective=1.0)

    assert task.run([0, 0, 0, 0], RUNNING, says=False, pause=pause) == 0
    assert len(waits) == 3 and task.unit().done
