"""Processes that are the ranks of runs: started once for all tests, since importing everything takes ten seconds."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
# short runs of the tiny model in float32, on data of the package
COMMON = (
    *("model=tiny", "model.dtype=float32", "tracking=none", "threads=1", "lora.r=4", "device=cpu"),
    *("dataset.max_response_tokens=24", "checkpoint_every=2"),
)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments(size: int) -> list[dict[str, str]]:
    """Of `size` ranks on this machine; of one process alone there is nothing to say."""
    base = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    if size == 1:
        return [base]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [base | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


class Ranks:
    """Some living ranks."""

    def __init__(self, size: int):
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for environment in environments(size)
        ]

    def run(self, cwd: Path, argv: Sequence[str], stop: dict[int, int] | None = None) -> list[dict[str, Any]]:
        """Run a command on all ranks; stop: rank -> step after which it is asked to stop. Their answers."""
        for rank, process in enumerate(self.processes):
            asked = {"cwd": str(cwd), "argv": list(argv), "stop": (stop or {}).get(rank)}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            line = process.stdout.readline()
            assert line, f"a rank is gone: {process.wait(10)}"
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _ranks(size: int) -> Iterator[Ranks]:
    found = Ranks(size)
    yield found
    found.close()


@pytest.fixture(scope="session")
def one() -> Iterator[Ranks]:
    """A process alone, as whose runs the others' have to be."""
    yield from _ranks(1)


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _ranks(4)


# ---------------------------------------------------------------- runs

TOLERANCE = 1e-5
TRAIN = ("train.steps=5", "train.batch_size=8")
ANSWERS = ("adapters.sft=base", "reward_source=length", "generation.max_new_tokens=12")
STAGES = {
    "sft": ("stage=sft", *TRAIN, "train.micro_batch_size=8"),
    "reward": ("stage=reward", *TRAIN, "train.micro_batch_size=4"),
    "dpo": ("stage=dpo", *TRAIN, "adapters.sft=base", "train.micro_batch_size=4"),
    "kto": ("stage=kto", *TRAIN, "adapters.sft=base", "train.micro_batch_size=4"),
    "ilql": ("stage=ilql", *TRAIN, *ANSWERS, "train.micro_batch_size=4", "ilql.eval_prompts=4"),
    "ppo": (
        *("stage=ppo", *ANSWERS, "ppo.steps=2", "ppo.batch_size=8", "ppo.minibatches=2", "ppo.epochs=2"),
        *("ppo.micro_batch_size=2", "generation.top_k=20", "ppo.save_every=1"),
    ),
}
# every weight of the tiny model is below DeepSpeed's bound for what it leaves whole
CUT_UP = "strategy.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
STRATEGIES = {
    "ddp": ("strategy=ddp",),
    "zero1": ("strategy=zero1",),
    "zero2": ("strategy=zero2",),
    "zero3": ("strategy=zero3", CUT_UP),
    "zero3_offload": ("strategy=zero3_offload", CUT_UP),
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="session")
def alone(one, runs):
    """stage -> the run folder of one process; made once."""
    made: dict[str, Path] = {}

    def run(stage: str) -> Path:
        if stage not in made:
            made[stage] = done(one, runs, "alone", stage, ())
        return made[stage]

    return run


def done(ranks, runs: Path, name: str, stage: str, words) -> Path:
    """The run folder of a stage that these ranks have trained."""
    answers = ranks.run(runs, [*STAGES[stage], *COMMON, f"output_dir={name}", *words])
    assert [answer["code"] for answer in answers] == [0] * len(answers), answers[0]["err"]
    (record,) = (runs / name / stage).glob("*/run.json")
    return record.parent


def figures(folder: Path) -> list[dict[str, float]]:
    """Every logged figure but those of time, step by step; at the end those of the run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.append(json.loads((folder / "run.json").read_text())["metrics"])
    timed = ("time/", "tokens_per_second")
    return [{name: x for name, x in row.items() if not name.startswith(timed)} for row in rows]


def require_same(folder: Path, other: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = figures(folder), figures(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    apart = [
        (i, name, x, theirs[i][name])
        for i, row in enumerate(ours)
        for name, x in row.items()
        if x != theirs[i][name] and not math.isclose(x, theirs[i][name], rel_tol=1e-4, abs_tol=TOLERANCE)
    ]
    assert not apart
    files = {file.relative_to(folder) for file in folder.rglob("*.safetensors")}
    assert files == {file.relative_to(other) for file in other.rglob("*.safetensors")}
    assert files
    for file in files:
        one, two = load_file(folder / file), load_file(other / file)
        assert one.keys() == two.keys()
        for name in one:
            assert float((one[name] - two[name]).abs().max()) <= TOLERANCE, (file, name)
    samples = [(path / "samples.jsonl").read_text() for path in (folder, other)]
    texts = [[json.loads(line).get("response") for line in text.splitlines()] for text in samples]
    assert texts[0] == texts[1]
