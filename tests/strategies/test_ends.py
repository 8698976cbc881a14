"""How runs on several ranks end when something is wrong: in seconds, all of them, with one line that says why."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.strategies.conftest import COMMON, STAGES, environments, require_same

COMMAND = (sys.executable, "-m", "rlhf_exp")


def started(size: int, argv: Sequence[str], apart: Sequence[Sequence[str]] = ()) -> list[subprocess.Popen]:
    """The ranks of a command, each with words of its own; in the current folder."""
    return [
        subprocess.Popen(
            [*COMMAND, *argv, *(apart[rank] if apart else ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank, environment in enumerate(environments(size))
    ]


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines that begin with "error:", of all ranks."""
    deadline, outputs = time.monotonic() + seconds, []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
    finally:
        for process in processes:
            process.kill()
    lines = [line for _, err in outputs for line in err.splitlines() if line.startswith("error:")]
    return [process.returncode for process in processes], lines


@pytest.mark.timeout(300)
def test_a_rank_with_another_config_ends_all():
    argv = [*STAGES["sft"], *COMMON, "strategy=ddp"]
    codes, lines = ended(started(2, argv, [["seed=1"], ["seed=2"]]), 200)
    assert codes == [2, 2]
    assert lines == [
        "error: rank 1 has another config than rank 0: seed=2, rank 0 has 1: start all ranks with the same command"
    ]


@pytest.mark.timeout(300)
def test_a_rank_that_sees_other_data_ends_all(tmp_path):
    """The same path, another file: what a disk that is not shared looks like."""
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
        rows = [{"prompt": f"Say {i}", "response": f"{i} {rank}"} for i in range(40)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"node{rank}" / "rows.jsonl").write_text(text)
    argv = [*STAGES["sft"], *COMMON, "strategy=ddp", "dataset=jsonl"]
    argv += ["dataset.views.demonstrations=rows.jsonl", f"output_dir={tmp_path / 'outputs'}"]
    processes = []
    for rank, environment in enumerate(environments(2)):
        processes.append(
            subprocess.Popen(
                [*COMMAND, *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=tmp_path / f"node{rank}",
            )
        )
    codes, lines = ended(processes, 200)
    assert codes == [2, 2]
    (line,) = lines
    assert line.startswith("error: rank 1 sees other demonstrations of dataset jsonl (")


@pytest.mark.timeout(300)
def test_one_typo_is_told_once():
    codes, lines = ended(started(2, ["stage=sft", "train.stepz=5", "strategy=ddp"]), 200)
    assert codes == [2, 2]
    (line,) = lines
    assert "train.stepz" in line


def checkpointed(folder: Path, seconds: float = 200) -> Path:
    """The first checkpoint that appears below the folder."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := sorted(folder.glob("*/state/step_*")):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint in {folder}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_the_run_goes_on(victim, one):
    argv = [word for word in (*STAGES["ppo"], *COMMON) if not word.startswith(("ppo.steps", "checkpoint"))]
    argv += ["checkpoint_every=1", "ppo.steps=200", "strategy=ddp"]
    processes = started(2, argv)
    checkpointed(Path("outputs/ppo"))
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, lines = ended(processes, 60)
    assert time.monotonic() - began < 30
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    (line,) = lines
    assert f"rank {victim} on" in line
    assert "is gone without a word" in line
    argv[-1] = "strategy=single"
    (answer,) = one.run(Path.cwd(), argv, stop={0: 1})
    assert answer["code"] == 75, answer["err"]
    assert "continued from step" in answer["out"]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_torchrun_starts_it(strategy):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    argv = [*STAGES["sft"], *COMMON, f"strategy={strategy}"]
    done = subprocess.run([*torchrun, "-m", "rlhf_exp", *argv], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (record,) = Path("outputs/sft").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "FINISHED"
    assert done.stdout.count("done in") == 1  # rank 0 alone speaks


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["ppo", "sft"])
@pytest.mark.parametrize("before", ["zero2", "single"])
def test_a_run_goes_on_with_another_number_of_ranks(before, stage, one, two, alone, runs):
    """One rank alone is asked to stop, all stop after that step; moments come out of as many shards as there were."""
    first, then = (two, one) if before == "zero2" else (one, two)
    after = "single" if before == "zero2" else "zero2"
    name = f"resumed_{before}"
    argv = [*STAGES[stage], *COMMON, f"output_dir={name}", "checkpoint_every=100"]
    argv.remove("checkpoint_every=2")
    stop = {len(first.processes) - 1: 1}
    answers = first.run(runs, [*argv, f"strategy={before}"], stop=stop)
    assert [answer["code"] for answer in answers] == [75] * len(answers), answers[0]["err"]
    (state,) = (runs / name / stage).glob("*/state/step_00001")
    files = sorted(path.name for path in state.glob("optimizer*"))
    ranks = ["optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"]
    assert files == (ranks if before == "zero2" else [])
    answers = then.run(runs, [*argv, f"strategy={after}"])
    assert [answer["code"] for answer in answers] == [0] * len(answers), answers[0]["err"]
    assert "continued from step 1" in answers[0]["out"]
    (record,) = (runs / name / stage).glob("*/run.json")
    require_same(alone(stage), record.parent)
