"""The command line called in this process, and one whole experiment that many tests look at."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_exp.cli import main

SMOKE = ("experiment=smoke", "model.dtype=float32", "threads=1")
# the values of experiment=smoke that a ppo run of its own needs to be the same run
SMOKE_PPO = (
    "stage=ppo",
    "model=tiny",
    "dataset=reviews",
    "model.dtype=float32",
    "threads=1",
    "ppo.steps=3",
    "ppo.batch_size=8",
    "ppo.micro_batch_size=8",
    "ppo.epochs=2",
    "ppo.save_every=2",
    "generation.max_new_tokens=12",
    "upstream.sft={train: {steps: 4, batch_size: 8, micro_batch_size: 8}}",
    "upstream.reward={train: {steps: 4, batch_size: 8, micro_batch_size: 8}}",
)
# one iteration of four answers of four tokens
SHORT_PPO = (
    "stage=ppo",
    "model=tiny",
    "model.dtype=float32",
    "threads=1",
    "tracking=none",
    "ppo.steps=1",
    "ppo.batch_size=4",
    "ppo.epochs=1",
    "generation.max_new_tokens=4",
)


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return self.err.splitlines()


def call(*words: str) -> Result:
    """`python -m rlhf_exp WORDS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return Result(code, out.getvalue(), err.getvalue())


def runs(output: Path, stage: str = "*") -> list[Path]:
    """The run folders of an output folder."""
    return sorted(path for path in output.glob(f"{stage}/*") if path.is_dir() and path.name[0] != ".")


def records(output: Path) -> dict[str, list[dict[str, Any]]]:
    """run.json of every run folder, by stage."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in runs(output):
        if (folder / "run.json").exists():
            found.setdefault(folder.parent.name, []).append(json.loads((folder / "run.json").read_text()))
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for line in lines(path)
    ]


def refuses(words: Sequence[str], common: Sequence[str], message: str, folder: Path) -> None:
    """The command line must refuse `words`, and of `common` what they do not set, in one line that says `message`."""
    chosen = {word.partition("=")[0] for word in words}
    rest = [word for word in common if word.partition("=")[0] not in chosen]
    result = call(*rest, *words, f"output_dir={folder / 'out'}")
    assert result.code == 2, result.out
    assert len(result.errors) == 1, result.err
    assert result.errors[0].startswith("error: ") and message in result.errors[0], result.err


@pytest.fixture(scope="session")
def cli() -> SimpleNamespace:
    return SimpleNamespace(
        call=call,
        refuses=refuses,
        runs=runs,
        records=records,
        lines=lines,
        without_clock=without_clock,
        SMOKE=SMOKE,
        SMOKE_PPO=SMOKE_PPO,
        SHORT_PPO=SHORT_PPO,
    )


@dataclass
class Smoke:
    """experiment=smoke, run once."""

    output: Path
    result: Result

    @property
    def words(self) -> Sequence[str]:
        return (*SMOKE, f"output_dir={self.output}")

    def folder(self, stage: str) -> Path:
        """The first run folder of a stage (other tests add runs of other keys)."""
        return self._folders[stage]

    def __post_init__(self) -> None:
        self._folders = {
            stage: found[0]
            for stage in ("sft", "reward", "ppo", "eval")
            if (found := runs(self.output, stage))
        }


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    output = tmp_path_factory.mktemp("smoke") / "outputs"
    result = call(*SMOKE, f"output_dir={output}")
    assert result.code == 0, result.out + result.err
    return Smoke(output, result)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is loaded fails the test."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("rlhf_exp.model.base.load_base", load)


@pytest.fixture
def store(smoke: Smoke) -> Callable[[], Any]:
    """MLflow's own client on the experiment's database."""

    def client() -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{smoke.output / 'mlflow.db'}")

    return client
