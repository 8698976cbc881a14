"""What each task of a job runs: `python -m rlhf_exp.jobs.worker SWEEP 3`, or the name of an upstream stage for 3.

It starts the trial as a process of its own and looks how that ends. SLURM sends SIGUSR1, to both, some time before
the limit and when a job is preempted: the trial saves after its step and ends with exit code 75. The job is then put
back into the queue here (scontrol requeue) and goes on from there, in the same run folder and the same MLflow run. Of
several tasks only the first one says how the job ended, and requeues.

After SIGTERM the job is put back only where SLURM is preempting it and has sent no signal before. In all other cases
it was cancelled, has reached its limit, or is on its way back into the queue already.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType

from rlhf_exp.errors import EXIT_INTERRUPTED
from rlhf_exp.jobs import ranks, states, units
from rlhf_exp.jobs.script import FOLDER
from rlhf_exp.jobs.states import NoAnswer
from rlhf_exp.jobs.units import Unit
from rlhf_exp.sweeps import folder, ledger, trial

ASKS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
TRIES, PAUSE = 30, 10.0  # the controller may be away for minutes
KILLED_SOON = 120.0  # seconds after a requeue in which SLURM ends this process
ELSEWHERE = 5.0
EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: as of `python -m rlhf_exp`."""
    parser = argparse.ArgumentParser(prog="rlhf_exp.jobs.worker")
    parser.add_argument("--max-requeues", type=int, default=0)
    parser.add_argument("--signal-delay", type=int, default=0)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("unit", help="the number of a trial, or the name of an upstream job")
    args = parser.parse_args(argv)
    return Task(args.sweep, args.unit, args.max_requeues, args.signal_delay).run()


class Task:
    """One of the job's tasks."""

    def __init__(self, sweep: Path, name: str, max_requeues: int, signal_delay: int = 0):
        self.sweep, self.name, self.max_requeues = sweep.absolute(), name, max_requeues
        self.signal_delay = signal_delay
        self.who = {"number": int(name)} if name.isdecimal() else {"upstream": name}
        self.asked: list[int] = []  # signals, in order
        for number in ASKS:
            signal.signal(number, self._note)
        self.rank = ranks.apply()
        self.job = os.environ.get("SLURM_JOB_ID", "")
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)

    def run(self) -> int:
        if self.rank:
            return self.follow()
        if self.restarts > self.max_requeues:
            return self.give_up(f"started for the {self.restarts + 1}th time: {self.limit}")
        print(f"{self.name}: job {self.job}, start {self.restarts + 1}", flush=True)
        if self.has_missed_it():
            self.asked.append(signal.SIGUSR1)
        code = self.work()
        while code == 0 and not self.asked and not self.unit.ended:
            # a node that was given up may still be at it: its process has the trial until it ends
            time.sleep(ELSEWHERE)
            code = self.work()
        if code == EXIT_INTERRUPTED or -code in ASKS:
            return self.interrupted()
        if code and not self.unit.ended:
            self.end(states.exit_said(f"{max(code, 0)}:{max(-code, 0)}"))
        return code if code >= 0 else 128 - code

    def has_missed_it(self) -> bool:
        """Whether SLURM's signal came before this process listened: Python takes a moment to start."""
        try:
            known = states.details(self.job)
        except NoAnswer:
            return False
        try:
            left = datetime.fromisoformat(known.get("EndTime", "")) - datetime.now()
        except ValueError:  # Unknown: no limit
            return _preempted(known)
        return _preempted(known) or left.total_seconds() < self.signal_delay

    @property
    def unit(self) -> Unit:
        """As the ledger has it now."""
        return units.read(self.sweep)[self.name]

    @property
    def limit(self) -> str:
        return f"hydra.launcher.max_requeues={self.max_requeues}"

    def work(self) -> int:
        """The exit code of the trial's process; negative: the signal that ended it."""
        command = [*folder.python(), "-u", "-m", "rlhf_exp.jobs.child", str(self.sweep), self.name]
        if self.asked:  # before there was anybody to hear it
            return EXIT_INTERRUPTED
        return subprocess.Popen(command, env=folder.environment(self.sweep)).wait()

    def follow(self) -> int:
        """A rank that is not the first: its own log, and no say in what becomes of the job.

        Any exit code but 0 makes srun end the other tasks, the first among them before it has saved.
        """
        log = self.sweep / FOLDER / f"{self.name}-rank{self.rank}.log"
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        code = self.work()
        return 0 if code == EXIT_INTERRUPTED or -code in ASKS else abs(code)

    # ------------------------------------------------------------ interrupted

    def interrupted(self) -> int:
        """Saved, or stopped before there was anything to save: back into the queue, if that is ours to do."""
        reason = self.unit.reason or "stopped by a signal before it began"
        if not self.is_ours():
            return EXIT_INTERRUPTED
        if self.restarts >= self.max_requeues:
            return self.give_up(f"{reason}; not started again: {self.limit}")
        ledger.append(
            self.sweep, units.REQUEUED, **self.who, job=self.job, restart=self.restarts + 1, reason=reason
        )
        if not self.requeue():
            return self.give_up(f"{reason}; SLURM did not put it back into the queue")
        # an end by itself would look to SLURM like a failure: it is SLURM that ends this process now
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(KILLED_SOON)
        return EXIT_INTERRUPTED

    def is_ours(self) -> bool:
        """Whether nobody but us will put the job back: it runs, as far as SLURM knows, and was asked to end."""
        for _ in range(TRIES):
            try:
                known = states.details(self.job)
            except NoAnswer:
                time.sleep(PAUSE)
                continue
            asked = signal.SIGUSR1 in self.asked or _preempted(known)
            return known.get("JobState") == "RUNNING" and asked
        return False

    def requeue(self) -> bool:
        for _ in range(TRIES):
            done = subprocess.run(
                ["scontrol", "requeue", self.job], capture_output=True, text=True, timeout=120, check=False
            )
            # below 0: SLURM's SIGTERM has reached scontrol too
            if done.returncode <= 0 or "pending" in done.stderr.lower():
                return True
            print(f"scontrol requeue: {done.stderr.strip()}", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
        return False

    def give_up(self, reason: str) -> int:
        """The end of the job, from which only `python -m rlhf_exp.jobs resume` goes on."""
        self.end(reason)
        return EXIT_FAILED

    def end(self, reason: str) -> None:
        """Enter what the trial's process did not say."""
        print(reason, file=sys.stderr, flush=True)
        fields = {**self.who, "job": trial.job(), "status": ledger.FAILED, "reason": reason}
        ledger.append(self.sweep, ledger.ENDED, **fields)


def _preempted(known: Mapping[str, str]) -> bool:
    return known.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")


if __name__ == "__main__":
    sys.exit(main())
