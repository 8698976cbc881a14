"""What a stage is given besides its config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.progress import Progress
from rlhf_exp.store.runs import RunFolder
from rlhf_exp.tracking import RunLog, Tracker

if TYPE_CHECKING:
    from rlhf_exp.model.base import Base

ADAPTER, HEAD, CRITIC, CHECKPOINTS = "adapter", "head", "critic", "checkpoints"
HEAD_FILE = "head.safetensors"


@dataclass
class Context:
    """One run of one stage: the loaded base, where it writes, and what it stands on."""

    base: Base
    folder: RunFolder
    tracker: Tracker
    parents: dict[str, Path] = field(default_factory=dict)  # stage -> its run folder or PEFT folder

    @contextmanager
    def log(self, stage: str, steps: int, show: Sequence[tuple[str, str, str]]) -> Iterator[RunLog]:
        """metrics.jsonl, samples.jsonl, the tracker and a progress bar for `steps` steps."""
        with (
            Progress(stage, steps, show) as progress,
            RunLog(self.folder.path, self.tracker, progress) as log,
        ):
            yield log

    def adapter(self, stage: str) -> Path | None:
        """The PEFT folder of a parent stage; None where the base itself takes its place."""
        folder = self.parents.get(stage)
        return None if folder is None else adapter_folder(folder)

    def head(self, stage: str) -> Path:
        """The head's file of a parent stage."""
        return head_file(self.parents[stage])


def adapter_folder(given: Path) -> Path:
    """The PEFT folder in a run folder, or the folder itself."""
    return given / ADAPTER if (given / ADAPTER).is_dir() else given


def head_file(given: Path) -> Path:
    """The head that belongs to an adapter: in the run folder, or beside a PEFT folder's files."""
    return given / HEAD / HEAD_FILE if (given / HEAD).is_dir() else given / HEAD_FILE
