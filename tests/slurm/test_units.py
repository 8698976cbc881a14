"""The ledger's events as jobs, and what is entered for jobs that could not say how they ended."""

from __future__ import annotations

import pytest

from rlhf_exp.jobs import states, units, watch
from rlhf_exp.jobs.states import NEVER, State
from rlhf_exp.sweeps import ledger


@pytest.fixture
def sweep(tmp_path):
    """Upstream sft runs as job 16; trials 0 and 1 wait for it as 17_0 and 17_1."""
    ledger.append(tmp_path, "trial", number=0, overrides=["a=1"])
    ledger.append(tmp_path, "trial", number=1, overrides=["a=2"])
    ledger.append(tmp_path, "submitted", upstream="sft-ab", stage="sft", job="16")
    for number in (0, 1):
        ledger.append(tmp_path, "submitted", number=number, stage="ppo", job=f"17_{number}", after=["sft-ab"])
    return tmp_path


@pytest.fixture
def slurm(monkeypatch):
    """slurm(**{"16": State(...)}): what the next question is answered."""
    said: dict[str, State] = {}
    monkeypatch.setattr(states, "query", lambda jobs: {job: said.get(job, State("RUNNING")) for job in jobs})
    monkeypatch.setattr(watch, "GRACE", 0.0)
    return said.update


def statuses(sweep):
    return {row.unit.name: (row.status, row.why) for row in watch.look(sweep)}


def test_events_of_a_job_that_was_put_back(sweep):
    ledger.append(sweep, "started", number=0, host="n1", pid=1, job="123")
    ledger.append(sweep, "ended", number=0, status="interrupted", reason="stopped by SIGUSR1 at step 3")
    unit = units.read(sweep)["0"]
    assert (unit.status, unit.ended, unit.open, unit.job) == ("interrupted", False, True, "17_0")
    ledger.append(sweep, "requeued", number=0, job="123", restart=1)
    ledger.append(sweep, "started", number=0, host="n2", pid=2, job="123")
    unit = units.read(sweep)["0"]
    assert (unit.status, unit.starts, unit.restarts, unit.host) == ("running", 2, 1, "n2")
    ledger.append(sweep, "ended", number=0, status="done", objective=0.5)
    unit = units.read(sweep)["0"]
    assert (unit.done, unit.open, unit.end["objective"]) == (True, False, 0.5)


def test_submitted_again_it_begins_anew(sweep):
    ledger.append(sweep, "started", number=0, host="n1", pid=1)
    ledger.append(sweep, "ended", number=0, status="failed", reason="x")
    assert units.read(sweep)["0"].ended
    ledger.append(sweep, "submitted", number=0, stage="ppo", job="20_0")
    unit = units.read(sweep)["0"]
    assert (unit.open, unit.job, unit.starts, unit.reason) == (True, "20_0", 0, "")


def test_what_nobody_has_lost_stays_as_it_is(sweep, slurm):
    slurm({"17_0": State("PENDING", "Dependency"), "17_1": State("PENDING", "Priority")})
    before = ledger.read(sweep)
    assert statuses(sweep) == {
        "sft-ab": ("running", ""),
        "0": ("waiting", "waits for sft-ab"),
        "1": ("waiting", "Priority"),
    }
    assert ledger.read(sweep) == before


def test_a_job_that_failed_and_those_that_waited_for_it(sweep, slurm):
    ledger.append(sweep, "started", upstream="sft-ab", host="n1", pid=1)
    ledger.append(sweep, "ended", upstream="sft-ab", status="failed", reason="RuntimeError: no")
    slurm({"17_0": State("CANCELLED", NEVER), "17_1": State("PENDING", NEVER)})
    assert statuses(sweep) == {
        "sft-ab": ("failed", "RuntimeError: no"),
        "0": ("failed", "not started: sft-ab did not end well (job 17_0)"),
        "1": ("failed", "not started: sft-ab did not end well (job 17_1)"),
    }
    assert [event["lost"] for event in ledger.read(sweep)[-2:]] == ["CANCELLED", "PENDING"]


@pytest.mark.parametrize(
    ("state", "status", "why"),
    [
        (State("CANCELLED", "", "n1"), "interrupted", "cancelled on n1 (job 17_0)"),
        (State("NODE_FAIL", "", "n1"), "failed", "lost with its node on n1 (job 17_0)"),
        (
            State("OUT_OF_MEMORY", "", "n1"),
            "failed",
            "killed for memory on n1: ask for more, hydra.launcher.mem (job 17_0)",
        ),
        (State("COMPLETED", "", "n1"), "failed", "ended on n1 without a result (job 17_0)"),
        (
            State(states.GONE),
            "failed",
            "SLURM does not know the job any more, and it left no result (job 17_0)",
        ),
    ],
)
def test_a_job_that_was_lost_while_it_ran(sweep, slurm, state, status, why):
    ledger.append(sweep, "started", number=0, host="n1", pid=1)
    slurm({"17_0": state, "17_1": State("PENDING")})
    assert statuses(sweep)["0"] == (status, why)
    lines = len(ledger.read(sweep))
    assert statuses(sweep)["0"] == (status, why)
    assert len(ledger.read(sweep)) == lines  # entered once


def test_the_ledger_is_believed_before_slurm(sweep, slurm, monkeypatch):
    """A process wrote its end in the moment between two looks."""
    ledger.append(sweep, "started", number=0, host="n1", pid=1)
    slurm({"17_0": State("COMPLETED"), "17_1": State("PENDING")})
    monkeypatch.setattr(
        watch.time, "sleep", lambda _: ledger.append(sweep, "ended", number=0, status="done", objective=1.0)
    )
    assert statuses(sweep)["0"] == ("done", "")


def test_a_job_may_be_named_without_its_sweep(tmp_path, monkeypatch, capsys):
    """The newest sweep is meant, as where nothing is named."""
    from rlhf_exp.jobs import __main__ as command
    from rlhf_exp.jobs import submit

    monkeypatch.chdir(tmp_path)
    for name in ("2026-01-01", "2026-01-02"):
        place = tmp_path / "multirun" / "results" / name
        for number in range(3):
            ledger.append(place, "trial", number=number, overrides=[])
            ledger.append(place, "submitted", number=number, stage="ppo", job=f"{name[-1]}_{number}")
        (place / "sweep.json").write_text("{}")
    (place / "slurm").mkdir()
    (place / "slurm" / "2_1.log").write_text("first\nsecond\n")
    assert command.main(["logs", "1", "-n", "1"]) == 0
    assert capsys.readouterr().out == "== 1: multirun/results/2026-01-02/slurm/2_1.log\nsecond\n"
    cancelled = []
    monkeypatch.setattr(submit, "cancel", lambda jobs: cancelled.extend(jobs) or "")
    assert command.main(["cancel", "0", "2"]) == 0
    assert cancelled == ["2_0", "2_2"]
    assert command.main(["cancel", "7"]) == 2
    assert "2026-01-02 has no job 7; there are: 0, 1, 2" in capsys.readouterr().err
    assert cancelled == ["2_0", "2_2"]


def test_waiting_goes_on_while_slurm_does_not_answer(sweep, monkeypatch):
    answers = iter([states.NoAnswer("away"), states.NoAnswer("away"), None])

    def query(jobs):
        if (answer := next(answers, None)) is not None:
            raise answer
        for number in (0, 1):
            ledger.append(sweep, "ended", number=number, status="done", objective=number)
        return {job: State("COMPLETED") for job in jobs}

    monkeypatch.setattr(states, "query", query)
    monkeypatch.setattr(watch, "GRACE", 0.0)
    said: list[str] = []
    found = watch.wait(sweep, [0, 1], 0.0, said.append, pause=lambda _: None)
    assert [found[n].end["objective"] for n in (0, 1)] == [0, 1]
    assert said[0] == "SLURM does not answer, asking again: away"
    assert said.count(said[0]) == 1
