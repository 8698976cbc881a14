"""hydra/launcher=slurm with two nodes of two tasks: their four ranks train what one process trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.strategies.conftest import COMMON, STAGES, STRATEGIES, require_same_run

PPO = (*STAGES["ppo"], *COMMON)
UPSTREAM = "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"


def command(place: Path, *words: str) -> str:
    """Run it in a folder; what it said."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_exp", *words],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    logs = "".join(
        f"== {log.name}\n{log.read_text()}" for log in sorted((place / "sweep" / "slurm").glob("*.log"))
    )
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return done.stdout


def result(place: Path, stage: str) -> Path:
    """The folder of the only run of a stage."""
    (record,) = place.glob(f"outputs/{stage}/*/run.json")
    assert json.loads(record.read_text())["status"] == "FINISHED"
    return record.parent


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("strategy", "words"),
    [("zero2", PPO), ("zero3", [UPSTREAM if word == "adapters.sft=base" else word for word in PPO])],
)
def test_two_nodes_of_two_tasks_train_as_one_process(strategy, words, slurm, tmp_path):
    """Under zero3 also the stage before, a job of its own on as many ranks."""
    launcher = ("hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2")
    four = tmp_path / "four"
    given = (*launcher, "hydra.launcher.poll_s=0.5", f"hydra.sweep.dir={four / 'sweep'}")
    command(four, "-m", *words, *STRATEGIES[strategy], *given)
    logs = four / "sweep" / "slurm"
    assert [path.name for path in sorted(logs.glob("0-rank*.log"))] == [f"0-rank{i}.log" for i in (1, 2, 3)]
    for script in logs.glob("*.sh"):
        assert "#SBATCH --nodes=2\n" in script.read_text()
        assert "#SBATCH --ntasks-per-node=2\n" in script.read_text()
    command(tmp_path / "one", *words)
    stages = ("sft", "ppo") if UPSTREAM in words else ("ppo",)
    for stage in stages:
        require_same_run(result(tmp_path / "one", stage), result(four, stage))
