"""The trial of a sweep that this process is in the middle of: where it is, whose child it is, which runs it has.

Hydra's folder of a sweep (multirun/results/TIME/NUMBER) holds nothing of a run: the runs are in output_dir, where
other commands find them again. runs.txt in the trial's folder lists them, for stage=report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.store import atomic
from rlhf_exp.store.runs import PREFIX

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Node, Plan

RUNS = "runs.txt"  # absolute paths, one a line: what the trial stands on, then itself


@dataclass
class Trial:
    """folder: sweep/number; parent: MLflow's run of the sweep, None without MLflow; keys: what the sweep is over."""

    folder: Path
    number: int
    overrides: list[str] = field(default_factory=list)
    parent: str | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def sweep(self) -> Path:
        return self.folder.parent

    @property
    def name(self) -> str:
        """For people: the number, and what is swept."""
        return f"trial {self.number} {self.values}".rstrip()

    @property
    def values(self) -> str:
        """What the trial has of the keys that are swept."""
        return " ".join(line for line in self.overrides if line.partition("=")[0].lstrip("+") in self.keys)


_trial: ContextVar[Trial | None] = ContextVar("the trial", default=None)


def trial() -> Trial | None:
    """The trial; None outside of a sweep."""
    return _trial.get()


@contextmanager
def inside(found: Trial | None) -> Iterator[None]:
    """What runs in this block is this trial; None: it is no trial."""
    token = _trial.set(found)
    try:
        yield
    finally:
        _trial.reset(token)


def parent_run() -> str | None:
    """The sweep's run in MLflow, whose children all runs of its trials are."""
    found = _trial.get()
    return found.parent if found else None


def is_own(node: Node, plan: Plan) -> bool:
    """Whether a stage is what the trial is about, not upstream of it; of stage=pipeline its ppo and eval are."""
    return node is plan.target or (plan.config.stage == "pipeline" and node.name == "ppo")


def tags(node: Node, plan: Plan) -> dict[str, object]:
    """What MLflow is told of a stage's run: of which trial it is, or that it is upstream of several."""
    found = _trial.get()
    if found is None:
        return {}
    tags = {"sweep.role": "upstream", "sweep.folder": str(found.sweep.absolute())}
    if is_own(node, plan):
        own = {"sweep.role": "trial", "sweep.trial": found.number}
        tags |= own | {"sweep.overrides": found.values}
    return tags


def name(node: Node, plan: Plan) -> str | None:
    """What MLflow calls a stage's run; None: as usual."""
    found = _trial.get()
    return f"{found.name} ({node.name})" if found is not None and is_own(node, plan) else None


def note(plan: Plan) -> None:
    """Write the list, if this is a trial: also before the runs are made, since they may fail."""
    found = _trial.get()
    if found is None or plan.config.dry_run:
        return
    paths = []
    for node in plan.nodes:
        if node.config is not None:
            paths.append(node.folder or Path(node.config.output_dir) / node.stage / node.key[:PREFIX])
    found.folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(found.folder / RUNS, "".join(f"{path.absolute()}\n" for path in paths).encode())


def noted(file: Path) -> list[Path]:
    """The run folders of a list."""
    return [Path(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
