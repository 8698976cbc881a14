"""An sbatch script, and its way to SLURM, through submitit.

What submitit is used for: the script's text from parameters that it checks, the call of sbatch, the job's id out of
the answer, and reading lists of nodes. What it is not used for, and why:

- running the job: submitit pickles a function and its arguments. A trial is a file (trial.yaml) and frozen code, so
  that a later edit changes nothing and people can read what waits; the script calls `rlhf_exp.jobs.worker`.
- time limits and preemption: it takes every job whose limit is 10 minutes or less for timed out when it is preempted,
  and keeps the count of restarts in the pickle. worker.py asks SLURM.
- states: it asks sacct alone, and without accounting waits for ever for a job that was cancelled. See states.py.
- array indices: it counts from 0; here the index is the trial's number.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from rlhf_exp.errors import InputError
from rlhf_exp.jobs.settings import Settings, resources_of
from rlhf_exp.sweeps import folder

FOLDER = "slurm"  # in the sweep's: scripts, and a log for each job
SIGNAL = "USR1"
# what submitit and we call by one name
NAMED = ("partition", "account", "qos", "constraint", "exclude", "nodes", "cpus_per_task", "gpus_per_node")
BLOCK = 1000  # trials that one array may have at most: MaxArraySize is 1001 unless a cluster says otherwise


@dataclass(frozen=True)
class Job:
    """What is submitted by one sbatch. name: of an upstream job; numbers: of the trials of an array."""

    stage: str
    name: str | None = None
    numbers: tuple[int, ...] = ()
    after: tuple[str, ...] = field(default=())  # ids of jobs that must end well before

    @property
    def offset(self) -> int:
        """What is added to an array's index to give the trial's number."""
        return self.numbers[0] // BLOCK * BLOCK if self.numbers else 0


class Executor(SlurmExecutor):
    """submitit's executor for a command instead of a function; the text can be had where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self, command: str) -> str:
        return self._make_submission_file_text(command, "")

    def submit_command(self, command: str) -> str:
        """Returns the job's id. Raises InputError with what sbatch says."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            return self._submit_command(command).job_id
        except FileNotFoundError:
            raise InputError(
                "hydra/launcher=slurm: sbatch is not here; submit where SLURM's commands are"
            ) from None
        except (FailedJobError, FailedSubmissionError) as error:
            raise InputError(f"SLURM refused the job: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """sbatch's own words out of submitit's message, without the prefixes."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: error:" in line]
    words = [line.partition("sbatch: error:")[2].strip() for line in lines]
    return "; ".join(words) or " ".join(str(error).split())


def text(job: Job, sweep: Path, settings: Settings) -> str:
    """The script of a job."""
    return _executor(job, sweep, settings).text(command(job, sweep, settings))


def submit(job: Job, sweep: Path, settings: Settings) -> str:
    """Give a job to SLURM; returns its id."""
    (sweep / FOLDER).mkdir(parents=True, exist_ok=True)
    return _executor(job, sweep, settings).submit_command(command(job, sweep, settings))


def log(sweep: Path, job: str) -> Path:
    """Where a job, or a task of an array (17_3), writes; all its attempts, one after the other."""
    return sweep / FOLDER / f"{job}.log"


def command(job: Job, sweep: Path, settings: Settings) -> str:
    """The script's last line."""
    cpus = resources_of(settings, job.stage).cpus_per_task
    # srun ends the other tasks when one fails, and since 22.05 does not take the CPUs over from sbatch
    srun = ["srun", "--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    # until Python listens the signal would kill it; the worker asks SLURM whether it has missed one
    words = [*srun, "bash", "-c", f'trap "" {SIGNAL}; exec "$@"', "worker", *folder.python(), "-u", "-m"]
    words += ["rlhf_exp.jobs.worker", f"--max-requeues={settings.max_requeues}"]
    words += [f"--signal-delay={settings.signal_delay_s}", str(sweep.absolute())]
    which = shlex.quote(job.name) if job.name else "$SLURM_ARRAY_TASK_ID"
    if job.offset:
        which = f"$(({which} + {job.offset}))"
    return f"{shlex.join(words)} {which}"


def _executor(job: Job, sweep: Path, settings: Settings) -> Executor:
    executor = Executor(folder=sweep.absolute() / FOLDER)
    executor.update_parameters(**_parameters(job, sweep.absolute(), settings))
    return executor


def _parameters(job: Job, sweep: Path, settings: Settings) -> dict[str, Any]:
    """Of submitit's executor; what it has no word for goes through `additional_parameters`, where the user's win."""
    asked = resources_of(settings, job.stage)
    named = {name: getattr(asked, name) for name in NAMED} | {"ntasks_per_node": asked.tasks_per_node}
    own: dict[str, Any] = {
        "signal": f"{SIGNAL}@{settings.signal_delay_s}",
        "requeue" if settings.max_requeues else "no-requeue": True,
        "chdir": folder.read(sweep)["cwd"] if folder.is_sweep(sweep) else os.getcwd(),
        "output": str(log(sweep, "%A_%a" if job.numbers else "%j")),
        "mem": asked.mem,  # submitit would want a number of GB
    }
    if job.numbers:
        indices = ",".join(str(number - job.offset) for number in job.numbers)
        own["array"] = f"{indices}%{settings.array_parallelism}"
    if job.after:
        own |= {"dependency": f"afterok:{':'.join(job.after)}", "kill-on-invalid-dep": "yes"}
    frozen = folder.environment(sweep, {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    exports = [f"export {name}={shlex.quote(value)}" for name, value in frozen.items()]
    others = {
        name: value
        for name, value in (own | asked.additional_parameters).items()
        if value not in (None, False)
    }
    return {name: value for name, value in named.items() if value is not None} | {
        "time": asked.time,  # given in any case: submitit's own default is 5 minutes
        "wckey": None,
        "job_name": f"{settings.name} {job.name or job.stage}",
        "setup": [*(asked.setup or ()), *exports],
        "stderr_to_stdout": True,
        "use_srun": False,  # the command has its own
        "additional_parameters": others,
    }
