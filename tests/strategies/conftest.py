"""Processes that are the ranks of runs: forked once for all tests from one that has imported everything."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.strategies import worker

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.strategies.preload"])
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
    """Some living ranks; where one is gone, the next command finds new ones."""

    def __init__(self, size: int):
        self.size = size
        self.processes: list[BaseProcess] = []
        self.links: list[Connection] = []

    def start(self) -> None:
        for environment in environments(self.size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=worker.serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.links.append(ours)

    def run(
        self,
        cwd: Path | Sequence[Path],
        argv: Sequence[str],
        stop: dict[int, int] | None = None,
        late: dict[int, float] | None = None,
        apart: Sequence[Sequence[str]] = (),
        gradients: str | None = None,
    ) -> list[dict[str, Any]]:
        """Run a command on all ranks. Their answers.

        cwd: of all, or of each. stop: rank -> step after which it is asked to stop. late: rank -> seconds by which
        it is behind (worker.py). apart: words of each rank alone.
        gradients: the file that each writes into cwd, with the rank in front.
        """
        if not self.links:
            self.start()
        for rank, link in enumerate(self.links):
            place = cwd if isinstance(cwd, Path) else cwd[rank]
            asked = {"cwd": str(place), "argv": [*argv, *(apart[rank] if apart else ())]}
            asked["stop"] = (stop or {}).get(rank)
            asked["late"] = (late or {}).get(rank, 0.0)
            asked["gradients"] = gradients and str(place / f"{rank}_{gradients}")
            link.send(asked)
        answers: list[dict[str, Any] | None] = []
        for link in self.links:
            try:
                answers.append(link.recv())
            except EOFError:
                answers.append(None)
        if not all(answer and answer["code"] in ENDS for answer in answers):
            self.close()
        gone = [rank for rank, answer in enumerate(answers) if answer is None]
        assert not gone, f"ranks {gone} are gone; the others: {[each['err'] for each in answers if each]}"
        return answers

    def close(self) -> None:
        for link in self.links:
            link.close()
        for process in self.processes:
            process.join(20)
            process.kill()
        self.processes, self.links = [], []


def _ranks(size: int) -> Iterator[Ranks]:
    found = Ranks(size)
    yield found
    found.close()


@pytest.fixture(scope="session")
def one() -> Iterator[Ranks]:
    """A process alone, as whose runs the others' have to be."""
    yield from _ranks(1)


@pytest.fixture
def two() -> Iterator[Ranks]:
    """New for each test: what one command leaves in a process is no other's, as when users start it."""
    yield from _ranks(2)


@pytest.fixture
def four() -> Iterator[Ranks]:
    yield from _ranks(4)


# ---------------------------------------------------------------- runs

ENDS = (0, 2, 75)  # exit codes after which the ranks are still together
TOLERANCE = 1e-5
WITHOUT_WEIGHTS = ("prefer", "probe", "eval")  # stages that train nothing
TRAIN = ("train.steps=5", "train.batch_size=8")
ANSWERS = ("adapters.sft=base", "reward_source=length", "generation.max_new_tokens=12")
STAGES = {
    "sft": ("stage=sft", *TRAIN, "train.micro_batch_size=8"),
    "reward": ("stage=reward", *TRAIN, "train.micro_batch_size=4"),
    "dpo": ("stage=dpo", *TRAIN, "adapters.sft=base", "train.micro_batch_size=4"),
    "kto": ("stage=kto", *TRAIN, "adapters.sft=base", "train.micro_batch_size=4"),
    "ilql": ("stage=ilql", *TRAIN, *ANSWERS, "train.micro_batch_size=4", "ilql.eval_prompts=4"),
    "rft": ("stage=rft", *TRAIN, *ANSWERS, "train.micro_batch_size=2", "rft.samples=2", "rft.prompts=8"),
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


class Trained(NamedTuple):
    """A stage's run folder; of each rank the file with the gradients of every step, and what it has sent."""

    folder: Path
    gradients: list[Path]
    sent: list[dict[str, int]]


@pytest.fixture(scope="session")
def alone(one, runs):
    """(stage, words) -> what one process makes of it; made once."""
    made: dict[tuple[str, ...], Trained] = {}

    def run(stage: str, *words: str) -> Trained:
        key = (stage, *words)
        if key not in made:
            made[key] = done(one, runs, f"alone{len(made)}", stage, words)
        return made[key]

    return run


def done(ranks, runs: Path, name: str, stage: str, words: Sequence[str]) -> Trained:
    """What these ranks have made of a stage."""
    gradients = f"{name}_{stage}.safetensors"
    argv = [*STAGES[stage], *COMMON, f"output_dir={name}", *words]
    answers = ranks.run(runs, argv, gradients=gradients)
    assert [answer["code"] for answer in answers] == [0] * len(answers), answers[0]["err"]
    (record,) = (runs / name / stage).glob("*/run.json")
    files = [runs / f"{rank}_{gradients}" for rank in range(len(answers))]
    return Trained(record.parent, files, [answer["sent"] for answer in answers])


def figures(folder: Path) -> list[dict[str, float]]:
    """Every logged figure but those of time, step by step; at the end those of the run."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows.append(json.loads((folder / "run.json").read_text())["metrics"])
    timed = ("time/", "tokens_per_second")
    return [{name: x for name, x in row.items() if not name.startswith(timed)} for row in rows]


def require_same(trained: Trained, other: Trained, left_out: Sequence[str] = ()) -> None:
    """Figures, answers, published weights, and the gradients of each step on each rank."""
    require_same_run(trained.folder, other.folder, left_out)
    (wanted,) = trained.gradients
    for file in other.gradients:
        require_close(wanted, file)


def require_same_run(folder: Path, other: Path, left_out: Sequence[str] = ()) -> None:
    """left_out: figures that may differ."""
    ours, theirs = figures(folder), figures(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    apart = [
        (i, name, x, theirs[i][name])
        for i, row in enumerate(ours)
        for name, x in row.items()
        if x != theirs[i][name] and not math.isclose(x, theirs[i][name], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    ]
    assert not [each for each in apart if each[1] not in left_out]
    files = {file.relative_to(folder) for file in folder.rglob("*.safetensors")}
    assert files == {file.relative_to(other) for file in other.rglob("*.safetensors")}
    assert files or folder.parent.name in WITHOUT_WEIGHTS
    for file in files:
        require_close(folder / file, other / file)
    for name in ("samples.jsonl", "comparisons.jsonl"):
        texts = [texts_of(path / name) for path in (folder, other)]
        assert texts[0] == texts[1]


def texts_of(file: Path) -> list[list[str]]:
    """The texts in each line of a file that may not be there."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [[x for x in json.loads(line).values() if isinstance(x, str)] for line in lines]


def require_close(file: Path, other: Path) -> None:
    """Tensors of the same names, each within the tolerance."""
    from safetensors.torch import load_file

    one, two = load_file(file), load_file(other)
    assert one.keys() == two.keys()
    assert one
    for name in one:
        assert float((one[name] - two[name]).abs().max()) <= TOLERANCE, (other, name)
