"""Jobs on a real cluster, and all that can happen to one. The training is pretended (pretended.py), SLURM is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rlhf_exp.jobs import __main__ as command
from rlhf_exp.jobs import script, states, submit, units, watch
from rlhf_exp.jobs.graph import Graph, write
from rlhf_exp.jobs.settings import Settings
from rlhf_exp.jobs.units import Unit
from rlhf_exp.sweeps import ledger
from tests.slurm.cluster import alive
from tests.slurm.pretended import after

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]


def graph_of(number: int) -> Graph:
    """Trials of stage sft that wait for nothing."""
    return Graph(stages=dict.fromkeys(range(number), "sft"), after={n: [] for n in range(number)})


def until(what: Callable[[], object], seconds: float = 60) -> object:
    """Wait for it; the time is generous, since the machine may be busy with other things."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def steps(sweep: Path, number: int) -> list[int]:
    """The steps that were done, in order."""
    file = sweep.parent / "outputs" / str(number) / "steps.txt"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def digest(sweep: Path, number: int) -> str:
    return json.loads((sweep.parent / "outputs" / str(number) / "state.json").read_text())["digest"]


def undisturbed(number: int) -> str:
    """The digest after so many steps without a break."""
    state = {"step": 0, "digest": ""}
    for _ in range(number):
        state = after(state)
    return state["digest"]


def wait(sweep: Path, numbers: Sequence[int], said: list[str] | None = None) -> dict[int, Unit]:
    return watch.wait(sweep, numbers, 0.3, (said if said is not None else []).append)


def start(sweep: Path, settings: Settings, number: int) -> Graph:
    graph = graph_of(number)
    write(sweep, graph, settings)
    submit.submit(sweep, graph, settings, range(number))
    return graph


def state(job: str) -> str:
    """SLURM's word; nothing while the controller is away."""
    try:
        return states.of(job).name
    except states.NoAnswer:
        return ""


def logs(sweep: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((sweep / "slurm").glob("*.log")))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_everything_that_can_happen_to_a_job(slurm, pretended, capsys):
    """0 ends, 1 raises, 2 is cancelled, 3 killed, 4 preempted, 5 requeued by an administrator, 6 loses its node."""
    quick, slow = "steps=3", "steps=60,pause=0.2"
    sweep = pretended([quick, "steps=5,raises=3", slow, slow, slow, "steps=300,pause=0.2", slow])
    # a node for each of two trials at a time; five minutes: submitit would take a preemption for a timeout
    settings = Settings(cpus_per_task=8, time="5", signal_delay_s=10)
    start(sweep, settings, 7)
    jobs = {number: units.read(sweep)[str(number)].job for number in range(7)}
    wait(sweep, [0, 1])

    def trained(number: int) -> Callable[[], object]:
        return lambda: len(steps(sweep, number)) > 3

    until(trained(2))
    slurm.run("scancel", jobs[2])
    began = time.monotonic()
    cancelled = wait(sweep, [2])[2]
    assert time.monotonic() - began < 20
    until(trained(3))
    os.kill(next(e["pid"] for e in ledger.read(sweep) if e.get("number") == 3 and "pid" in e), signal.SIGKILL)
    killed = wait(sweep, [3])[3]
    until(trained(4))
    node = states.of(jobs[4]).nodes
    slurm.run("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    until(lambda: units.read(sweep)["4"].restarts)
    until(trained(5))
    slurm.stop_controller()
    with pytest.raises(states.NoAnswer):
        watch.look(sweep)
    slurm.start_controller()
    until(lambda: state(jobs[5]) == "RUNNING")
    slurm.run("scontrol", "requeue", jobs[5])
    until(trained(6), 120)
    node = states.of(jobs[6]).nodes
    slurm.set_node(node, "down")
    pid = [event["pid"] for event in ledger.read(sweep) if event.get("number") == 6 and "pid" in event][-1]
    # a node that still has the old process refuses the new one, and SLURM holds the job
    until(lambda: state(jobs[6]) != "RUNNING" and not alive(pid))
    time.sleep(5)
    slurm.set_node(node, "resume")
    said: list[str] = []
    found = wait(sweep, range(7), said)

    text = logs(sweep)
    assert {n: unit.status for n, unit in found.items()} == {
        0: "done", 1: "failed", 2: "interrupted", 3: "failed", 4: "done", 5: "done", 6: "done",
    }, text  # fmt: skip
    assert found[1].reason == "RuntimeError: the loss is not a number"
    assert cancelled.reason.startswith("cancelled on n") and cancelled.reason.endswith(f"(job {jobs[2]})")
    assert "SIGKILL" in killed.reason
    for number, length in ((4, 60), (5, 300), (6, 60)):
        assert found[number].end["objective"] == length
        assert found[number].starts == 2, (number, text)
        assert steps(sweep, number) == list(range(1, length + 1)), (number, text)  # none lost, none twice
        assert digest(sweep, number) == undisturbed(length)
    assert len(steps(sweep, 2)) < 60 and len(steps(sweep, 3)) < 60

    # what failed is submitted again and ends; what has ended is not run again
    before = len(steps(sweep, 0))
    assert command.main(["resume", str(sweep)]) == 0
    again = wait(sweep, [2, 3])
    assert [unit.status for unit in again.values()] == ["done", "done"], logs(sweep)
    for number in (2, 3):
        assert steps(sweep, number) == list(range(1, 61))
        assert digest(sweep, number) == undisturbed(60)
    assert len(steps(sweep, 0)) == before
    capsys.readouterr()
    until(lambda: not units.read(sweep)["1"].open)
    assert command.main(["collect", str(sweep)]) == 1
    shown = capsys.readouterr()
    assert "1 of 7 trials are not done; go on: " in shown.out
    assert shown.err == "error: trial 1 (run_name=steps=5,raises=3): RuntimeError: the loss is not a number\n"
    table = json.loads((sweep / "table.json").read_text())
    assert [row["status"] for row in table] == ["done", "failed", *["done"] * 5]


def test_a_job_is_started_again_only_so_often(slurm, pretended):
    sweep = pretended(["steps=100,pause=0.2"])
    start(sweep, Settings(max_requeues=1), 1)
    job = units.read(sweep)["0"].job
    for starts in (1, 2):
        until(
            lambda starts=starts: (
                units.read(sweep)["0"].starts == starts and steps(sweep, 0)[-1:] > [2 * starts]
            )
        )
        slurm.run("scancel", "--signal=USR1", job)  # what SLURM sends before the time limit
    unit = wait(sweep, [0])[0]
    assert (unit.status, unit.restarts) == ("failed", 1), logs(sweep)
    assert unit.reason.endswith("not started again: hydra.launcher.max_requeues=1")
    assert steps(sweep, 0) == list(range(1, len(steps(sweep, 0)) + 1))


def test_commands_on_a_sweep_that_nobody_waits_for(slurm, pretended, capsys, monkeypatch):
    sweep = pretended(["steps=3", "steps=300,pause=0.2", "steps=300,pause=0.2"])
    monkeypatch.setenv("COLUMNS", "200")
    start(sweep, Settings(cpus_per_task=8), 3)
    until(lambda: len(steps(sweep, 1)) > 1)
    assert command.main(["status", str(sweep)]) == 0
    shown = capsys.readouterr().out
    assert "running" in shown and "run_name=steps=300,pause=0.2" in shown
    assert command.main(["collect", str(sweep)]) == 75
    assert command.main(["cancel", str(sweep), "2"]) == 0
    assert [unit.status for unit in wait(sweep, [2]).values()] in (["failed"], ["interrupted"])
    capsys.readouterr()
    assert command.main(["cancel", str(sweep)]) == 0
    assert "cancelled: " in capsys.readouterr().out
    found = wait(sweep, range(3))
    assert found[1].status == "interrupted" and found[1].reason.startswith("cancelled")
    assert command.main(["collect", str(sweep)]) == 1
    capsys.readouterr()
    assert command.main(["cancel", str(sweep)]) == 0
    assert capsys.readouterr().out == "nothing waits or runs\n"
    assert command.main(["logs", str(sweep), "0"]) == 0
    assert f"== 0: {script.log(sweep, found[0].job)}" in capsys.readouterr().out
    assert command.main(["logs", str(sweep), "7"]) == 2
    assert command.main(["status", str(sweep / "0")]) == 2
    assert "it has no sweep.json" in capsys.readouterr().err


def test_watching_and_following_until_the_end(slurm, pretended, monkeypatch):
    """As people do it: `status --watch` and `logs --follow` in shells of their own."""
    sweep = pretended(["steps=40,pause=0.1"])
    start(sweep, Settings(), 1)
    monkeypatch.setenv("COLUMNS", "160")
    program = [sys.executable, "-u", "-m", "rlhf_exp.jobs"]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    follow = subprocess.Popen([*program, "logs", str(sweep), "0", "--follow"], **pipes)
    watch = subprocess.Popen([*program, "status", str(sweep), "--watch", "--every=0.3"], **pipes)
    shown, _ = watch.communicate(timeout=200)
    assert watch.returncode == 0
    assert "1 trial: 1 done" in shown.splitlines()[-1]
    said, _ = follow.communicate(timeout=60)  # by itself, when the job has ended
    assert follow.returncode == 0
    assert f"== 0: {script.log(sweep, units.read(sweep)['0'].job)}\n" in said
    assert said.count(", start 1\n") == 1 and said.count("trial 0: run_name=") == 1


@pytest.mark.long
def test_a_job_of_five_minutes_is_preempted_like_any_other(slurm, pretended):
    """submitit takes a job with a limit of ten minutes or less for one that has reached it, and ends it."""
    sweep = pretended(["steps=60,pause=0.2"])
    start(sweep, Settings(time="5", cpus_per_task=8), 1)
    until(lambda: len(steps(sweep, 0)) > 3)
    node = states.of(units.read(sweep)["0"].job).nodes
    slurm.run("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    unit = wait(sweep, [0])[0]
    assert (unit.status, unit.starts, unit.restarts) == ("done", 2, 1), logs(sweep)
    (requeued,) = (event for event in ledger.read(sweep) if event["event"] == "requeued")
    assert requeued["reason"].startswith("stopped by SIGUSR1 at step ")
    assert steps(sweep, 0) == list(range(1, 61))
    assert digest(sweep, 0) == undisturbed(60)


def test_tasks_on_two_nodes_find_each_other(slurm, pretended):
    sweep = pretended(["meet=4"])
    start(sweep, Settings(nodes=2, tasks_per_node=2), 1)
    unit = wait(sweep, [0])[0]
    ranks = "".join(path.read_text() for path in (sweep / "slurm").glob("*-rank*.log"))
    assert unit.status == "done", logs(sweep) + ranks
    assert unit.end["objective"] == 1 + 2 + 3 + 4
    found = [json.loads((sweep / "0" / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["node"]) for one in found] == [
        ("0", "0", "n1"), ("1", "1", "n1"), ("2", "0", "n2"), ("3", "1", "n2"),
    ]  # fmt: skip
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["MASTER_ADDR"]) for one in found} == {
        ("4", "2", "127.0.0.1")
    }
    assert len({one["MASTER_PORT"] for one in found}) == 1
    events = [event["event"] for event in ledger.read(sweep)]
    assert events.count("started") == 1 and events.count("ended") == 1  # only the first rank writes


def test_what_sbatch_refuses_is_said_and_nothing_stays_behind(slurm, pretended):
    from rlhf_exp.errors import InputError

    sweep = pretended(["steps=1", "steps=1"])
    graph = graph_of(2)
    graph.stages[1] = "ppo"
    settings = Settings()
    settings.by_stage.sft.additional_parameters = {"hold": True}
    settings.by_stage.ppo.partition = "nowhere"
    with pytest.raises(InputError, match="SLURM refused the job: invalid partition specified: nowhere"):
        submit.submit(sweep, graph, settings, [0, 1])
    job = units.read(sweep)["0"].job
    assert states.of(job).name == "CANCELLED"
