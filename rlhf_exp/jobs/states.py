"""What SLURM says about jobs: squeue for those it remembers, then the job-completion file, then sacct where it works.

submitit asks sacct alone, and takes a job that it does not find for a running one: without an accounting database a
cancelled job would be waited for for ever.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FORMAT = "%i|%T|%r|%N|%M"  # id, state, reason, nodes, run time
UNKNOWN_ID = "Invalid job id"
GONE = "GONE"  # our word: SLURM does not know the job any more
# it will not run again by itself; COMPLETED among them, all else is still to come or under way
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED", GONE}
NEVER = "DependencyNeverSatisfied"
TAIL = 4 * 2**20  # bytes of the completion file that are read: it grows for as long as the cluster lives


@dataclass(frozen=True)
class State:
    """One job, or one task of an array."""

    name: str
    reason: str = ""
    nodes: str = ""
    time: str = ""
    exit: str = ""  # SLURM's code:signal, where it is known

    @property
    def ended(self) -> bool:
        return self.name in ENDED or self.reason == NEVER

    def said(self) -> str:
        """How it ended, for people."""
        if self.reason == NEVER:
            return "not started: what it depends on did not end well"
        where = f" on {self.nodes}" if self.nodes else ""
        words = {
            "CANCELLED": f"cancelled{where}",
            "TIMEOUT": f"reached its time limit{where}",
            "NODE_FAIL": f"lost with its node{where}",
            "OUT_OF_MEMORY": f"killed for memory{where}: ask for more, hydra.launcher.mem",
            "PREEMPTED": f"preempted{where} and not put back into the queue",
            "BOOT_FAIL": f"its node did not boot{where}",
            "DEADLINE": "its deadline passed",
            GONE: "SLURM does not know the job any more, and it left no result",
            "COMPLETED": f"ended{where} without a result",
        }
        return words.get(self.name) or f"{exit_said(self.exit)}{where}"


def exit_said(code: str) -> str:
    """SLURM's `code:signal` in words; a shell says 128 + signal."""
    status, _, number = code.partition(":")
    if not status.isdigit():
        return "failed"
    signal = int(number or 0) or (int(status) - 128 if int(status) > 128 else 0)
    if signal == 9:
        return "killed by SIGKILL (by somebody, or by the system for want of memory)"
    return f"killed by signal {signal}" if signal else f"ended with exit code {status}"


class NoAnswer(Exception):
    """SLURM's controller cannot be asked now: that says nothing about the jobs."""


def query(jobs: Collection[str]) -> dict[str, State]:
    """The state of each job; GONE for one that nobody knows. Raises NoAnswer where SLURM cannot be asked."""
    if not jobs:
        return {}
    found = {job: state for job, state in _squeue(jobs) if job in jobs}
    for job, state in found.items():
        if state.name == "FAILED":
            found[job] = _with_exit(job, state)
    for more in (_completed, _sacct):
        if absent := set(jobs) - found.keys():
            found |= more(absent)
    return found | {job: State(GONE) for job in set(jobs) - found.keys()}


def of(job: str) -> State:
    return query([job])[job]


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{words[0]}: {error}") from error


def _squeue(jobs: Collection[str]) -> Iterator[tuple[str, State]]:
    """What the controller remembers: everything that waits or runs, and what ended in the last MinJobAge seconds."""
    arrays = sorted({job.partition("_")[0] for job in jobs}, key=int)
    done = _call("squeue", "-h", "-r", "-t", "all", "-j", ",".join(arrays), "-o", FORMAT)
    if done.returncode and UNKNOWN_ID not in done.stderr:
        raise NoAnswer(done.stderr.strip())
    for line in done.stdout.splitlines():
        job, *rest = line.strip().split("|")
        if len(rest) == 4:
            yield job, State(rest[0], _clean(rest[1]), rest[2], rest[3])


def _clean(reason: str) -> str:
    return "" if reason in ("None", "(null)") else reason


def details(job: str) -> dict[str, str]:
    """What `scontrol show job` says; empty where it does not know the job."""
    done = _call("scontrol", "-o", "show", "job", job)
    if done.returncode and UNKNOWN_ID not in done.stderr:
        raise NoAnswer(done.stderr.strip())
    return fields_of(done.stdout.partition("\n")[0])


def fields_of(line: str) -> dict[str, str]:
    """SLURM's `Key=value Key=value`; a value with blanks in it loses what is after the first."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _with_exit(job: str, state: State) -> State:
    return State(state.name, state.reason, state.nodes, state.time, details(job).get("ExitCode", ""))


@cache
def _completion_file() -> Path | None:
    """Where the cluster writes a line for each finished job, if it does and we may read it."""
    said = re.findall(r"^JobComp(Type|Loc)\s*=\s*(\S*)", _call("scontrol", "show", "config").stdout, re.M)
    found = dict(said)
    place = Path(found.get("Loc") or "/nonexistent")
    return place if found.get("Type") == "jobcomp/filetxt" and place.is_file() else None


def _completed(jobs: Collection[str]) -> dict[str, State]:
    file = _completion_file()
    if file is None:
        return {}
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL))
            text = stream.read().decode(errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        known = fields_of(line)
        job = known.get("JobId", "")
        if known.get("ArrayJobId"):
            job = f"{known['ArrayJobId']}_{known['ArrayTaskId']}"
        if job in jobs and known.get("JobState") in ENDED:  # PENDING: a line of a requeue
            found[job] = State(
                known["JobState"], "", known.get("NodeList", ""), "", known.get("ExitCode", "")
            )
    return found


def _sacct(jobs: Collection[str]) -> dict[str, State]:
    """Nothing where there is no accounting."""
    try:
        done = _call("sacct", "-n", "-P", "-X", "-j", ",".join(jobs), "-o", "JobID,State,ExitCode,NodeList")
    except NoAnswer:
        return {}
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        job, state, code, nodes = [*line.split("|"), "", "", ""][:4]
        if job in jobs and state:  # "CANCELLED by 1000"
            found[job] = State(state.split()[0], "", nodes, "", code)
    return found
