"""Sweeps of real trainings on a real cluster, from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from rlhf_exp.jobs import states, units
from rlhf_exp.sweeps import ledger
from tests.slurm.cluster import alive
from tests.slurm.test_jobs import state, until

WORDS = (
    *("stage=ppo", "model=tiny", "dataset=reviews", "model.dtype=float32", "threads=1", "lora.r=4"),
    *("generation.max_new_tokens=4", "checkpoint_every=1"),
    "upstream.sft={train: {steps: 2, batch_size: 4}}",
)
PPO = "ppo={{steps: {}, batch_size: 4, epochs: 1, minibatches: 1, micro_batch_size: 4, save_every: 2}}"
CLOCK = ("time/", "tokens_per_second")
SCORES = '''
"""One function, and so one run, for each trial; the slow ones leave time to do something to them."""
import time


def quick(prompts, responses):
    return [float(len(text)) for text in responses]


def slow(prompts, responses):
    time.sleep(1.0)
    return quick(prompts, responses)


calls = 0


def fails(prompts, responses):
    global calls
    calls += 1
    if calls > 4:
        raise RuntimeError("no score today")
    return quick(prompts, responses)


def cancelled(prompts, responses):
    return slow(prompts, responses)


def killed(prompts, responses):
    return slow(prompts, responses)


def preempted(prompts, responses):
    return slow(prompts, responses)


def lost(prompts, responses):
    return slow(prompts, responses)
'''


class Sweep:
    """A sweep that another process runs."""

    def __init__(self, place: Path, *words: str):
        self.place, self.path = place, place / "sweep"
        (place / "scores.py").write_text(SCORES)
        command = [sys.executable, "-m", "rlhf_exp", "-m", *WORDS, *words, "hydra/launcher=slurm"]
        command += [f"hydra.sweep.dir={self.path}", "hydra.launcher.poll_s=0.5"]
        self.output = (place / "output.txt").open("w+")
        self.process = subprocess.Popen(command, cwd=place, stdout=self.output, stderr=subprocess.STDOUT)

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()

    @property
    def units(self) -> dict[str, units.Unit]:
        return units.read(self.path)

    def said(self) -> str:
        return (self.place / "output.txt").read_text() + "".join(
            f"== {log}\n{log.read_text()}" for log in sorted((self.path / "slurm").glob("*.log"))
        )

    def until(self, what: Callable[[], object], seconds: float = 900) -> object:
        """As `until`; a sweep that ends before is an error."""

        def now() -> object:
            if not (found := what()):
                assert self.process.poll() is None, self.said()
            return found

        return until(now, seconds)

    def job(self, number: int) -> str:
        return self.until(lambda: (unit := self.units.get(str(number))) and unit.job)

    def step(self, number: int) -> int:
        """The step of the latest checkpoint."""
        return max(
            (int(path.name[5:]) for run in self.run(number) for path in run.glob("state/step_?????")),
            default=0,
        )

    def run(self, number: int) -> list[Path]:
        file = self.path / str(number) / "runs.txt"
        return [Path(file.read_text().splitlines()[-1])] if file.exists() else []

    def pid(self, number: int) -> int:
        return [
            event["pid"]
            for event in ledger.read(self.path)
            if event.get("number") == number and "pid" in event
        ][-1]

    def end(self) -> int:
        return self.process.wait(timeout=600)


def numbers(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(CLOCK)} for line in lines]


def weights(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


@pytest.mark.timeout(400)
def test_trials_wait_for_what_they_share_and_it_is_built_once(slurm, tmp_path):
    words = (PPO.format(1), "reward_source=length", "ppo.kl_coef=.1,.2", "tracking=none")
    with Sweep(tmp_path, *words, "hydra.launcher.by_stage.sft.cpus_per_task=2") as sweep:
        assert sweep.end() == 0, sweep.said()
        said = (tmp_path / "output.txt").read_text()
    (upstream,) = (name for name in sweep.units if name.startswith("sft-"))
    assert sweep.units["0"].after == sweep.units["1"].after == [upstream]
    events = [
        (event["event"], event.get("upstream") or event.get("number")) for event in ledger.read(sweep.path)
    ]
    assert events.index(("ended", upstream)) < min(events.index(("started", n)) for n in (0, 1))
    assert all(events.count(("started", name)) == 1 for name in (upstream, 0, 1))
    assert len(list(tmp_path.glob("outputs/sft/*/run.json"))) == 1
    assert len(list(tmp_path.glob("outputs/ppo/*/run.json"))) == 2
    script = (sweep.path / "slurm" / f"{sweep.units[upstream].job}_submission.sh").read_text()
    assert "#SBATCH --cpus-per-task=2\n" in script
    array = sweep.units["0"].job.partition("_")[0]
    script = (sweep.path / "slurm" / f"{array}_submission.sh").read_text()
    assert f"#SBATCH --dependency=afterok:{sweep.units[upstream].job}\n" in script
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    assert "--cpus-per-task" not in script
    assert f"trial 0 (job {array}_0): done\n" in said
    # the same command again: nothing is submitted, the table is the same
    with Sweep(tmp_path, *words, "hydra.launcher.by_stage.sft.cpus_per_task=2") as again:
        assert again.end() == 0, again.said()
        assert "submitted" not in (tmp_path / "output.txt").read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_who_waits_is_asked_to_stop_and_the_jobs_go_on(slurm, tmp_path, asked, code):
    """MLflow's run of the sweep is open until all is collected."""

    def status():
        with closing(sqlite3.connect(tmp_path / "outputs" / "mlflow.db")) as database:
            return database.execute("SELECT status FROM runs WHERE name LIKE 'sweep%'").fetchall()

    words = (PPO.format(3), "reward_source=python", "reward_source.function=python:scores.slow")
    with Sweep(tmp_path, *words, "adapters.sft=base") as sweep:
        sweep.until(lambda: "0" in sweep.units and sweep.units["0"].starts)
        sweep.process.send_signal(asked)
        assert sweep.end() == code, sweep.said()
        said = sweep.said()
        assert f"the jobs go on; python -m rlhf_exp.jobs status|cancel {sweep.path}\n" in said
        assert "1 of 1 trials have not ended; see: python -m rlhf_exp.jobs status" in said
        assert status() == [("RUNNING",)]
        until(lambda: not sweep.units["0"].open, 600)
        collect = [sys.executable, "-m", "rlhf_exp.jobs", "collect", str(sweep.path)]
        done = subprocess.run(collect, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr + sweep.said()
        assert status() == [("FINISHED",)]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_sweep_to_which_everything_happens(slurm, tmp_path):
    """Of six trials one raises, one is cancelled, one killed, one preempted, one loses its node; SLURM restarts."""
    names = ("quick", "fails", "cancelled", "killed", "preempted", "lost")
    functions = ",".join(f"python:scores.{name}" for name in names)
    words = (PPO.format(12), "reward_source=python", f"reward_source.function={functions}")
    limits = ("hydra.launcher.time=5", "hydra.launcher.by_stage.ppo.cpus_per_task=8")  # a node for each
    with Sweep(tmp_path, *words, *limits) as sweep:
        sweep.until(lambda: sweep.step(2))
        slurm.run("scancel", sweep.job(2))
        sweep.until(lambda: sweep.step(3))
        os.kill(sweep.pid(3), signal.SIGKILL)
        sweep.until(lambda: sweep.step(4))
        node = states.of(sweep.job(4)).nodes
        slurm.run("sbatch", "-p", "high", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        sweep.until(lambda: sweep.units["4"].restarts)
        slurm.stop_controller()
        time.sleep(1)
        slurm.start_controller()
        sweep.until(lambda: sweep.step(5))
        node = states.of(sweep.job(5)).nodes
        slurm.set_node(node, "down")
        # a node that still has the old process refuses the new one, and SLURM holds the job
        sweep.until(lambda: state(sweep.job(5)) != "RUNNING" and not alive(sweep.pid(5)))
        time.sleep(5)
        slurm.set_node(node, "resume")
        assert sweep.end() == 1, sweep.said()
        said = sweep.said()

    found = {number: sweep.units[str(number)] for number in range(6)}
    expected = ("done", "failed", "interrupted", "failed", "done", "done")
    assert tuple(unit.status for unit in found.values()) == expected, said
    assert found[1].reason == "RuntimeError: no score today" or "no score today" in found[1].reason
    assert found[2].reason.startswith("cancelled") and "SIGKILL" in found[3].reason
    assert (found[4].starts, found[5].starts) == (2, 2), said
    table = json.loads((sweep.path / "table.json").read_text())
    assert tuple(row["status"] for row in table) == expected

    # nothing is trained twice: one sft, and each step of a trial once
    assert (
        sum(
            event.get("upstream") is not None and event["event"] == "started"
            for event in ledger.read(sweep.path)
        )
        == 1
    )
    assert len(list(tmp_path.glob("outputs/sft/*/run.json"))) == 1
    with closing(sqlite3.connect(tmp_path / "outputs" / "mlflow.db")) as database:
        twice = "SELECT run_uuid, key, step, COUNT(*) FROM metrics GROUP BY 1, 2, 3 HAVING COUNT(*) > 1"
        assert database.execute(twice).fetchall() == []
        runs = database.execute("SELECT name, status FROM runs WHERE name LIKE 'trial%'").fetchall()
        assert len(runs) == 6
        ended = {int(re.match(r"trial (\d)", name)[1]): status for name, status in runs}
        assert [ended[number] for number in (0, 4, 5)] == ["FINISHED"] * 3

    # what was interrupted ends, bit for bit, as what was not
    reference = [*WORDS, *words[:2], "reward_source.function=python:scores.preempted,python:scores.lost"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_exp", "-m", *reference, "tracking=none", "output_dir=undisturbed"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for number in (4, 5):
        (run,) = sweep.run(number)
        whole = tmp_path / "undisturbed" / "ppo" / run.name
        assert "continued from step" in (sweep.path / "slurm" / f"{found[number].job}.log").read_text()
        assert numbers(run) == numbers(whole)
        assert weights(run) == weights(whole)
        assert weights(run)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_time_limit_and_a_requeue_continue_in_the_same_run(slurm, tmp_path):
    words = (
        PPO.format(100),
        "reward_source=python",
        "reward_source.function=python:scores.slow,python:scores.lost",
    )
    # on a busy machine two minutes are a few steps
    limits = ("hydra.launcher.time=2", "hydra.launcher.signal_delay_s=45", "hydra.launcher.max_requeues=50")
    with Sweep(tmp_path, *words, *limits) as sweep:
        sweep.until(lambda: sweep.step(1) > 1)
        slurm.run("scontrol", "requeue", sweep.job(1))
        assert sweep.end() == 0, sweep.said()
        said = sweep.said()
    limited, requeued = sweep.units["0"], sweep.units["1"]
    assert limited.starts > 1 and requeued.starts > 1, said
    reasons = [event["reason"] for event in ledger.read(sweep.path) if event["event"] == "requeued"]
    assert any(reason.startswith("stopped by SIGUSR1 at step") for reason in reasons), said
    with closing(sqlite3.connect(tmp_path / "outputs" / "mlflow.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM runs WHERE name LIKE 'trial%'").fetchone() == (2,)
        steps = "SELECT COUNT(*), COUNT(DISTINCT step) FROM metrics WHERE key = 'objective/scores' GROUP BY run_uuid"
        assert database.execute(steps).fetchall() == [(100, 100)] * 2
