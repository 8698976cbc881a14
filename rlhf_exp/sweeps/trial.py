"""One trial of a sweep as a file, frozen before it waits, and what runs it.

    write(folder, number, overrides, config, choices)     when it is submitted
    run(folder)                                           in this process
    python -m rlhf_exp.sweeps.trial FOLDER                in another: command() and environment()

trial.yaml holds the whole composed config, so that nothing is composed anew for it; what its upstream stages need is
composed of the sweep's frozen tree. `run` writes the ledger: that it started and how it ended.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp import distributed
from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted, Pruned
from rlhf_exp.sweeps import current, figures, folder, ledger, pruning
from rlhf_exp.sweeps.trial_file import config_of, read, without_early_stop, without_hydra, write

__all__ = ["Outcome", "command", "config_of", "environment", "is_running", "job", "main", "read", "run"]
__all__ += ["without_early_stop", "without_hydra", "write"]

LOCK = ".lock"
ELSEWHERE = "running"  # another process has it
EXITS = {ledger.DONE: 0, ledger.STOPPED: 0, ledger.FAILED: 1, ELSEWHERE: 0}


@dataclass
class Outcome:
    """How a trial ended; the fields are those of the ledger's `ended`, but for the error itself."""

    number: int
    status: str
    reason: str = ""
    objective: float | None = None
    metric: str | None = None  # what the objective is
    gold: float | None = None
    kl: float | None = None
    seconds: float = 0.0
    run: str | None = None  # its run folder
    bad_input: bool = False
    error: BaseException | None = field(default=None, repr=False)

    @property
    def value(self) -> float | None:
        """What a sweeper is given: the objective of a trial that went to its end."""
        return self.objective if self.status == ledger.DONE else None

    def fields(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if name != "error"}
        return found | {"seconds": round(self.seconds, 3)}


def job() -> str | None:
    """The SLURM job that this process is part of, as the ledger counts: 16, or 17_3 of an array."""
    array, index = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")


def run(path: Path) -> Outcome:
    """Run a trial to its end in this process; whatever goes wrong in it is in the outcome.

    Only a signal or Ctrl-C is raised, after the ledger has it. A trial that has ended well is not run again, nor one
    that another process is running.
    """
    path = Path(path).absolute()
    content = read(path)
    number = content["number"]
    with _mine(path) as locked:
        # rank 0 alone has the lock and reads the ledger; all go its way, or some would wait for the others for ever
        mine, state = distributed.from_main(lambda: (locked, ledger.states(path.parent).get(number)))
        if not mine:
            print(f"trial {number}: another process is running it", flush=True)
            return Outcome(number, ELSEWHERE, "another process is running it")
        if state is not None and state.settled:
            print(f"trial {number}: {state.status} before, not run again", flush=True)
            return before(state)
        return _run(path, content)


def before(state: ledger.State) -> Outcome:
    """The outcome that the ledger has."""
    known = {name: state.end.get(name) for name in ("objective", "metric", "gold", "kl", "run")}
    return Outcome(state.number, state.status, state.reason, seconds=state.seconds, **known)


def _run(path: Path, content: dict[str, Any]) -> Outcome:
    number, sweep = content["number"], path.parent
    print(f"trial {number}: {' '.join(content['overrides'])}", flush=True)
    pruning.forget(path)
    _say(sweep, ledger.STARTED, number=number, host=socket.gethostname(), pid=os.getpid(), job=job())
    began = time.monotonic()
    found = Outcome(number, ledger.FAILED)
    try:
        found.objective = _inside(path, content)
        found.status = ledger.DONE
    except Pruned as error:
        found.status, found.reason = ledger.STOPPED, str(error)
    except (KeyboardInterrupt, SystemExit, Interrupted) as error:
        found.status, found.reason = ledger.INTERRUPTED, str(error) or type(error).__name__
        raise
    except InputError as error:
        found.error, found.bad_input, found.reason = error, True, "; ".join(error.problems)
    except Exception as error:
        found.error, found.reason = error, f"{type(error).__name__}: {error}".partition("\n")[0]
        traceback.print_exc()  # now; the sweep may go on for hours
    finally:
        found.seconds = time.monotonic() - began
        _measure(path, content, found)
        _say(sweep, ledger.ENDED, **found.fields())
    return found


def _inside(path: Path, content: dict[str, Any]) -> float | None:
    """The pipeline, on the frozen tree."""
    from rlhf_exp import compose

    sweep = path.parent
    known = folder.read(sweep) if folder.is_sweep(sweep) else {}
    parent, keys = known.get("mlflow_run_id"), known.get("swept") or []
    frozen = folder.conf(sweep)
    with compose.session(folder.config_dir(sweep), frozen if frozen.is_dir() else None):
        config = config_of(content)
        from rlhf_exp.stages import pipeline

        with current.inside(current.Trial(path, content["number"], content["overrides"], parent, keys)):
            return pipeline.run(config, content["choices"])


def _measure(path: Path, content: Mapping[str, Any], found: Outcome) -> None:
    """What its run folder says: gold, KL, and whether a guard ended it."""
    list_of_runs = path / current.RUNS
    runs = current.noted(list_of_runs) if list_of_runs.is_file() else []
    if not runs:
        return
    found.run = str(runs[-1])
    said = figures.of(runs[-1])
    found.metric, found.gold, found.kl = said.metric, said.gold, said.kl
    if found.status == ledger.DONE:
        _keep_values(path, runs, (content["config"].get("rft") or {}).get("rounds", 1))
        if said.stopped_by:
            found.status, found.reason = ledger.STOPPED, said.stopped_by


def _keep_values(path: Path, runs: Sequence[Path], rounds: int) -> None:
    """The step values of a run that was there already: others compare with them. rounds: of rft."""
    from rlhf_exp.tracking import read_metrics

    for run_folder in reversed(runs):
        if not (path / pruning.VALUES).exists():
            pruning.copy(path, read_metrics(run_folder / "metrics.jsonl"), figures.running(rounds))


def _say(sweep: Path, event: str, **fields: Any) -> None:
    if distributed.is_main():
        ledger.append(sweep, event, **fields)


@contextmanager
def _mine(path: Path) -> Iterator[bool]:
    """Whether this process has the trial for itself; the kernel gives it back however the process ends."""
    from filelock import FileLock, Timeout

    if not distributed.is_main():
        yield True
        return
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_running(path: Path) -> bool:
    """Whether a living process (of this machine, or of one that shares locks with it) runs the trial now."""
    with _mine(path) if (Path(path) / LOCK).exists() else nullcontext(True) as free:
        return not free


# ---------------------------------------------------------------- another process


def command(path: Path) -> list[str]:
    """The command that runs a trial; with `environment`, on the sweep's frozen code."""
    return [*folder.python(), "-m", "rlhf_exp.sweeps.trial", str(Path(path).absolute())]


def environment(path: Path, given: dict[str, str] | None = None) -> dict[str, str]:
    """Variables for `command`; given: os.environ."""
    return folder.environment(Path(path).absolute().parent, given)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trial of a folder; exit codes as of `python -m rlhf_exp` (0 also for one stopped early)."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if len(given) != 1:
            raise InputError("give one folder: python -m rlhf_exp.sweeps.trial FOLDER")
        path = Path(given[0]).absolute()
        cwd = read(path)["cwd"]
        if Path(cwd).is_dir():
            os.chdir(cwd)  # relative paths of the config are from where the sweep was started
        found = run(path)
        if found.bad_input:
            print(f"error: {found.reason}", file=sys.stderr)
            return EXIT_BAD_INPUT
        return EXITS[found.status]
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Interrupted as error:
        print(str(error) or "stopped by a signal", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    distributed.leave(main())
