"""The ledger's events as jobs, and what is entered for jobs that could not say how they ended."""

from __future__ import annotations

import json

import pytest

from rlhf_exp.jobs import __main__ as command
from rlhf_exp.jobs import graph as graphs
from rlhf_exp.jobs import script, states, submit, units, watch
from rlhf_exp.jobs.graph import Graph, Upstream
from rlhf_exp.jobs.settings import Settings
from rlhf_exp.jobs.states import NEVER, State
from rlhf_exp.sweeps import ledger

MOVED = '{"argv": [], "cwd": "/nowhere", "created": "", "version": ""}'


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


def test_submitted_again_it_may_run_before_that_is_noted(sweep):
    ledger.append(sweep, "started", number=0, host="n1", pid=1, job="17_0")
    ledger.append(sweep, "started", number=0, host="n1", pid=1, job="17_0")
    ledger.append(sweep, "ended", number=0, status="failed", reason="x")
    ledger.append(sweep, "started", number=0, host="n2", pid=1, job="20_0")
    ledger.append(sweep, "submitted", number=0, stage="ppo", job="20_0")
    unit = units.read(sweep)["0"]
    assert (unit.open, unit.status, unit.job, unit.host) == (True, "running", "20_0", "n2")
    assert (unit.starts, unit.restarts) == (1, 0), "of this job"


def test_an_array_that_is_through_before_its_submission_is_noted(tmp_path, monkeypatch):
    """Trial 0 runs and trial 1 fails before sbatch's answer is read."""

    def sbatch(job, sweep, settings):
        if job.name:
            ledger.append(sweep, "started", upstream=job.name, host="n1", pid=1, job="16")
            ledger.append(sweep, "ended", upstream=job.name, status="done")
            return "16"
        ledger.append(sweep, "started", number=0, host="n1", pid=1, job="17_0")
        ledger.append(sweep, "ended", number=0, status="done", objective=1.5)
        ledger.append(sweep, "ended", number=1, status="failed", reason="no GPU", job="17_1")
        return "17"

    writes, write_line = [], ledger.write_line
    monkeypatch.setattr(ledger, "write_line", lambda *given: (writes.append(given), write_line(*given)))
    monkeypatch.setattr(script, "submit", sbatch)
    after = {number: ["sft-ab"] for number in range(3)}
    graph = Graph({"sft-ab": Upstream("sft", "sft", 0)}, dict.fromkeys(range(3), "ppo"), after)
    assert submit.submit(tmp_path, graph, Settings(), range(3)) == ["16", "17"]
    assert len(writes) == 5 + 2, "a submission is one"
    found = units.read(tmp_path)
    assert {name: unit.status for name, unit in found.items()} == {
        "sft-ab": "done", "0": "done", "1": "failed", "2": "submitted",
    }  # fmt: skip
    assert [unit.job for unit in found.values()] == ["16", "17_0", "17_1", "17_2"]
    assert (found["0"].end["objective"], found["0"].stage, found["0"].after) == (1.5, "ppo", ["sft-ab"])
    assert [state.status for state in ledger.states(tmp_path).values()] == ["done", "failed", "submitted"]


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


@pytest.fixture
def given(sweep, slurm):
    """A sweep that was given to SLURM, with trial 2, which could not be composed."""
    reason = "ppo.minibatches must divide ppo.batch_size"
    ledger.append(sweep, "ended", number=2, status="failed", reason=reason, bad_input=True)
    content = {"argv": [], "cwd": str(sweep), "created": "", "version": ""}
    (sweep / "sweep.json").write_text(json.dumps(content))
    after = {0: [], 1: []}
    graphs.write(sweep, Graph({}, {0: "ppo", 1: "ppo"}, after), Settings())
    return sweep


def test_a_trial_that_never_was_a_job_cannot_be_submitted_again(given, monkeypatch, capsys):
    said = (
        "error: trial 2 (failed: ppo.minibatches must divide ppo.batch_size) was never given to SLURM and cannot be "
        f"submitted from here: repeat the sweep's command with hydra.sweep.dir={given}\n"
    )
    assert command.main(["resume", str(given)]) == 1
    assert capsys.readouterr() == ("", said), "trials 0 and 1 wait"
    ledger.append(given, "ended", number=0, status="done")
    ledger.append(given, "ended", number=1, status="failed", reason="no GPU")
    monkeypatch.setattr(script, "submit", lambda job, sweep, settings: "18")
    assert command.main(["resume", str(given)]) == 1
    assert capsys.readouterr() == ("trials 1: submitted as 18\n", said)
    ledger.append(given, "ended", number=2, status="done")
    assert command.main(["resume", str(given)]) == 0
    assert capsys.readouterr() == ("nothing to do: every trial has ended well, waits or runs\n", "")


@pytest.mark.parametrize(
    ("verb", "file", "content", "said"),
    [
        ("resume", "slurm.json", "{", "slurm.json cannot be read (JSONDecodeError: "),
        ("resume", "slurm.json", "[]", "slurm.json cannot be read (TypeError: "),
        ("resume", "slurm.json", '{"settings": {}}', "slurm.json cannot be read (KeyError: "),
        ("resume", "slurm.json", '{"settings": {"x": 1}}', "slurm.json cannot be read ("),
        ("resume", "sweep.json", MOVED, "was started in /nowhere, which is gone"),
        ("collect", "sweep.json", MOVED, "was started in /nowhere, which is gone"),
    ],
)
def test_a_damaged_sweep_is_a_line(given, capsys, verb, file, content, said):
    for who in ({"number": 0}, {"number": 1}, {"upstream": "sft-ab"}):
        ledger.append(given, "ended", **who, status="failed")
    (given / file).write_text(content)
    assert command.main([verb, str(given)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("every", ["0", "-1", "nan"])
def test_a_pause_that_is_none(given, capsys, every):
    assert command.main(["status", str(given), "--watch", "--every", every]) == 2
    assert capsys.readouterr().err == f"error: --every must be above 0, got {every}\n"


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
