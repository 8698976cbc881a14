"""Starts the trials' processes, waits for them, and passes signals on; knows nothing of Hydra."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hydra_plugins.rlhf_local_pool import _child, _lost
from hydra_plugins.rlhf_local_pool._share import Share
from hydra_plugins.rlhf_local_pool._view import View

from rlhf_exp.errors import Interrupted
from rlhf_exp.sweeps import folder, ledger
from rlhf_exp.sweeps import trial as trials

LOG = "log.txt"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL_SECONDS = 0.1
LAST_SECONDS = 30.0  # for trials to save when it is the launcher that failed


@dataclass
class Job:
    """A trial that waits in its folder."""

    number: int
    overrides: list[str]
    folder: Path
    varying: str = ""  # what sets it apart from the others, for the line on the screen


@dataclass
class Running:
    job: Job
    share: Share
    process: subprocess.Popen[bytes]
    ended_before: int  # `ended` events that the ledger had of it
    oom_kills: int
    began: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        return self.job.folder / LOG


class Pool:
    """shares: one for each trial that runs at a time. Use `run`."""

    def __init__(
        self,
        shares: Sequence[Share],
        view: View,
        *,
        environment: Mapping[str, str] | None = None,
        grace: float = _child.GRACE,
    ):
        self._free, self._view = list(shares), view
        self._environment, self._grace = dict(environment or {}), grace
        self._running: list[Running] = []
        self._asked: list[int] = []  # signals, in order
        self._passed = 0  # how many of them the trials have
        self._stop_by = 0.0
        self._read, self._write = os.pipe()  # the trials see its end

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, int], None]) -> None:
        """Run every trial; `ended(job, exit code)` after each, when the ledger says how it went.

        Raises Interrupted when a signal came, after all trials that ran have saved and stopped.
        """
        waiting = list(jobs)
        try:
            with self._listening():
                while self._running or (waiting and not self._asked):
                    while waiting and self._free and not self._asked:
                        job = self._startable(waiting)
                        if job is None:
                            break
                        waiting.remove(job)
                        self._start(job)
                    self._pass_on()
                    for one in [one for one in self._running if one.process.poll() is not None]:
                        self._settle(one, waiting, ended)
                    self._view.update(self._running)
                    time.sleep(POLL_SECONDS)
        finally:
            self._end_all()
            os.close(self._read)
            os.close(self._write)
        if self._asked:
            raise Interrupted(f"stopped by {signal.Signals(self._asked[0]).name}")

    def _startable(self, waiting: Sequence[Job]) -> Job | None:
        """The next trial that no process runs which an earlier launcher left behind."""
        return next((job for job in waiting if not trials.is_running(job.folder)), None)

    def _start(self, job: Job) -> None:
        share = self._free.pop(0)
        with open(job.folder / LOG, "ab") as log:
            process = subprocess.Popen(
                [*folder.python(), str(_script(job.folder.parent)), str(self._read), str(job.folder)],
                env=self._variables(job, share),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._read],
                start_new_session=True,  # the terminal's Ctrl-C is for us: we pass it on
            )
        running = Running(job, share, process, _ended(job), _lost.oom_kills())
        self._running.append(running)
        self._view.started(running)

    def _variables(self, job: Job, share: Share) -> dict[str, str]:
        found = trials.environment(job.folder)
        return found | {"PYTHONUNBUFFERED": "1"} | share.environment() | self._environment

    def _settle(self, one: Running, waiting: list[Job], ended: Callable[[Job, int], None]) -> None:
        """A process has ended: its share is free, and the ledger hears of a trial that could not say how it ended."""
        self._running.remove(one)
        self._free.append(one.share)
        code, job = one.process.returncode, one.job
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(one.process.pid, signal.SIGKILL)  # what it left behind
        if _ended(job) == one.ended_before:
            state = ledger.states(job.folder.parent).get(job.number)
            if code == 0 and state is not None and not state.settled:
                waiting.append(job)  # another process had it: when that is over, we see what became of it
                return
            if code != 0:
                self._note_lost(one, code)
        ended(job, code)

    def _note_lost(self, one: Running, code: int) -> None:
        reason = _lost.reason(code, _lost.oom_kills() > one.oom_kills, one.log)
        ledger.append(
            one.job.folder.parent,
            ledger.ENDED,
            number=one.job.number,
            status=ledger.INTERRUPTED if self._asked else ledger.FAILED,
            reason=reason,
            seconds=round(time.monotonic() - one.began, 3),
        )

    # ------------------------------------------------------------ signals

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note signals instead of dying of them; handlers are as before afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)

    def _pass_on(self) -> None:
        """Give the trials the signals that came: they save after one, stop at once after two, then SIGKILL."""
        if self._asked and not self._passed:
            self._stop_by = time.monotonic() + self._grace
            name = signal.Signals(self._asked[0]).name
            numbers = ", ".join(str(one.job.number) for one in self._running)
            if numbers:
                self._view.say(f"{name}: saving, then stopping (trials {numbers}); once more stops at once")
        while self._passed < len(self._asked):
            self._passed += 1
            self._send(signal.SIGTERM if self._passed < 3 else signal.SIGKILL)
        if self._asked and time.monotonic() > self._stop_by:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for one in self._running:
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(one.process.pid, number)
                else:
                    one.process.send_signal(number)

    def _end_all(self) -> None:
        """Leave no process behind, whatever went wrong here."""
        self._send(signal.SIGTERM)
        for one in self._running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(LAST_SECONDS)
        self._send(signal.SIGKILL)
        for one in self._running:
            one.process.wait()
        self._running.clear()


def _ended(job: Job) -> int:
    events = ledger.read(job.folder.parent)
    return sum(event.get("event") == ledger.ENDED and event.get("number") == job.number for event in events)


def _script(sweep: Path) -> Path:
    """_child.py: of the sweep's frozen code if it is there."""
    ours = Path(_child.__file__)
    frozen = folder.code(sweep) / folder.LAUNCHERS / folder.PLUGINS / ours.parent.name / ours.name
    return frozen.absolute() if frozen.is_file() else ours
