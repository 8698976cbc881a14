"""The command line in this process, with a stub in the pipeline's place."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_exp import cli, stages
from rlhf_exp.sweeps import current


class Pipeline(types.ModuleType):
    """Stands in for rlhf_exp.stages.pipeline: notes configs, choices and trials, and does `then`."""

    def __init__(self) -> None:
        super().__init__("rlhf_exp.stages.pipeline")
        self.calls: list[tuple[Any, dict[str, str], current.Trial | None]] = []
        self.then: Callable[[Any], float | None] = lambda config: 0.5

    def run(self, config: Any, choices: dict[str, str]) -> float | None:
        self.calls.append((config, choices, current.trial()))
        return self.then(config)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    stub = Pipeline()
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(stages, "pipeline", stub, raising=False)
    return stub


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """(exit code, stdout, lines of stderr) of `python -m rlhf_exp WORDS`."""

    def run(*words: str) -> tuple[int, str, list[str]]:
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def fail_with(error: BaseException) -> Callable[[Any], None]:
    def fail(config: Any) -> None:
        raise error

    return fail
