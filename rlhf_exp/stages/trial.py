"""Which run folders a trial of a sweep stands for: a list in the sweep's folder, where stage=report finds them.

Hydra's folder of a sweep (multirun/results/TIME/NUMBER) holds nothing of a run: the runs are in output_dir, where
other commands find them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.store import atomic
from rlhf_exp.store.runs import PREFIX

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Plan

RUNS = "runs.txt"  # absolute paths, one a line: what the trial stands on, then itself
_folder: ContextVar[Path | None] = ContextVar("folder of the trial", default=None)


@contextmanager
def inside(folder: Path | None) -> Iterator[None]:
    """What runs in this block is the trial of this folder; None: it is no trial."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def note(plan: Plan) -> None:
    """Write the list, if this is a trial: also before the runs are made, since they may fail."""
    folder = _folder.get()
    if folder is None or plan.config.dry_run:
        return
    paths = []
    for node in plan.nodes:
        if node.config is not None:
            paths.append(node.folder or Path(node.config.output_dir) / node.stage / node.key[:PREFIX])
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / RUNS, "".join(f"{path.absolute()}\n" for path in paths).encode())


def noted(file: Path) -> list[Path]:
    """The run folders of a list."""
    return [Path(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
