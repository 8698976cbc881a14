"""What SLURM's commands say, read: with commands that answer as SLURM 22.05 did."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from rlhf_exp.jobs import states
from rlhf_exp.jobs.states import GONE, NoAnswer, State

SQUEUE = """17_2|PENDING|JobArrayTaskLimit||0:00
2|PENDING|Dependency||0:00
17_0|RUNNING|None|n1|0:02
17_1|CANCELLED|None|n1|0:25
18|FAILED|NonZeroExitCode|n2|0:01
"""
CONFIG = "JobCompLoc              = {file}\nJobCompType             = jobcomp/filetxt\n"
LINE = "JobId={id} UserId=root(0) Name=a JobState={state} Partition=low NodeList=n1 {more}ExitCode={code} \n"


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """answer(squeue=...): the command prints this; with `error=`, that to stderr, and fails."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    states._completion_file.cache_clear()

    def make(name: str, text: str = "", error: str = "") -> None:
        (place / f"{name}.txt").write_text(text or error)
        end = ">&2; exit 1" if error else ""
        (place / name).write_text(f"#!/bin/sh\ncat {place}/{name}.txt {end}\n")
        (place / name).chmod(stat.S_IRWXU)

    for name in ("squeue", "scontrol", "sacct"):
        make(name, error="slurm_load_jobs error: Invalid job id specified")
    yield make
    states._completion_file.cache_clear()


def test_jobs_that_slurm_remembers(answer):
    answer("squeue", SQUEUE)
    answer("scontrol", "JobId=18 JobName=x y JobState=FAILED ExitCode=137:0 NodeList=n2\n")
    found = states.query(["17_0", "17_1", "17_2", "2", "18"])
    assert {job: (state.name, state.ended) for job, state in found.items()} == {
        "17_0": ("RUNNING", False),
        "17_1": ("CANCELLED", True),
        "17_2": ("PENDING", False),
        "2": ("PENDING", False),
        "18": ("FAILED", True),
    }
    assert found["17_0"] == State("RUNNING", "", "n1", "0:02")
    assert found["18"].said() == "killed by SIGKILL (by somebody, or by the system for want of memory) on n2"
    assert found["17_1"].said() == "cancelled on n1"


def test_jobs_that_it_has_forgotten(answer, tmp_path):
    file = tmp_path / "jobcomp.txt"
    array = "ArrayJobId=17 ArrayTaskId={} DerivedExitCode=0:0 "
    file.write_text(
        LINE.format(id=3, state="PENDING", more=array.format(0), code="0:0")  # put back into the queue
        + LINE.format(id=3, state="COMPLETED", more=array.format(0), code="0:0")
        + LINE.format(id=4, state="PENDING", more=array.format(1), code="0:0")
        + LINE.format(id=16, state="TIMEOUT", more="", code="0:0")
    )
    answer("scontrol", CONFIG.format(file=file))
    answer("sacct", "17_2|CANCELLED by 1000|0:0|n2\n")
    found = states.query(["17_0", "17_1", "17_2", "16"])
    assert {job: state.name for job, state in found.items()} == {
        "17_0": "COMPLETED",
        "17_1": GONE,
        "17_2": "CANCELLED",
        "16": "TIMEOUT",
    }
    assert found["16"].said() == "reached its time limit on n1"
    assert found["17_1"].said() == "SLURM does not know the job any more, and it left no result"


def test_a_controller_that_does_not_answer_says_nothing_about_jobs(answer):
    answer("squeue", error="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(NoAnswer, match="Unable to contact"):
        states.query(["17_0"])


def test_without_slurm_there_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoAnswer, match="squeue"):
        states.query(["1"])


def test_no_jobs_need_no_question(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states.query([]) == {}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1:0", "ended with exit code 1"),
        ("2:0", "ended with exit code 2"),
        ("0:9", "killed by SIGKILL (by somebody, or by the system for want of memory)"),
        ("139:0", "killed by signal 11"),
        ("", "failed"),
    ],
)
def test_exit_codes_in_words(code, said):
    assert states.exit_said(code) == said


def test_a_dependency_that_cannot_be_met_is_an_end():
    state = State("PENDING", states.NEVER)
    assert state.ended
    assert state.said() == "not started: what it depends on did not end well"
