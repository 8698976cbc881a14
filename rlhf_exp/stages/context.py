"""What a stage is given besides its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rlhf_exp import distributed
from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.data.records import Record
from rlhf_exp.data.tokenised import Tokenised, tokenised
from rlhf_exp.progress import Progress
from rlhf_exp.schema import Dataset
from rlhf_exp.store.runs import RunFolder
from rlhf_exp.tracking import NullTracker, RunLog, Tracker

if TYPE_CHECKING:
    from rlhf_exp.model.base import Base
    from rlhf_exp.stages.checkpoint import Checkpoint

ADAPTER, HEAD, CRITIC, CHECKPOINTS = "adapter", "head", "critic", "checkpoints"
START = "start"  # the role of a policy that ppo starts from instead of sft (prefer.start=last)
HEAD_FILE = "head.safetensors"
EMA = "ema"  # the averaged policy: its role, and the folder of its adapter
ILQL, HEADS_FILE = "ilql", "heads.safetensors"  # Q and V of ilql
EVALUATION, MARGINS = "evaluation", "margins.png"  # of reward: how good its preferences are
EXPORT = "export"  # the files that stage=export writes
SELECTED = "selected.jsonl"  # of rft: the answers that were learned
PREFERENCES = "prefer.json"  # of prefer: what was kept and left out, beside comparisons.jsonl
ROWS = 64  # answers that are generated or scored together where nothing is trained on them
MODEL = "model"  # of sft with lora.full: all weights, the base of the later stages


@dataclass
class Context:
    """One run of one stage: the loaded base, where it writes, and what it stands on."""

    base: Base
    folder: RunFolder
    tracker: Tracker
    parents: dict[str, Path] = field(default_factory=dict)  # stage -> its run folder or PEFT folder
    checkpoint_every: int = 0  # steps; 0: as often as that costs little
    typed: Callable[[str], str] = str  # a setting of this stage -> as it is typed in the command

    @contextmanager
    def log(
        self,
        stage: str,
        steps: int,
        show: Sequence[tuple[str, str, str]],
        found: Checkpoint | None = None,
    ) -> Iterator[RunLog]:
        """metrics.jsonl, samples.jsonl, the tracker and a progress bar for `steps` steps, from a checkpoint on."""
        position = found.log if found else None
        if not distributed.is_main():  # rank 0 keeps the log
            with TemporaryDirectory() as nowhere, RunLog(nowhere, NullTracker(), hold=True) as log:
                yield log
            return
        with (
            Progress(stage, steps, show) as progress,
            RunLog(self.folder.path, self.tracker, progress, hold=True, position=position) as log,
        ):
            yield log

    def read(self, dataset: Dataset, view: str, split: str) -> tuple[list[Record], Tokenised]:
        """The records of a split and their token ids; says what was read, what left out, and how long it is."""
        records = load_view(dataset, view, split)
        rows = tokenised(self.base.tokenizer, self.base.tokenizer_key, dataset, view, split)
        if split != "validation":  # the same file: said already
            print(statistics(dataset, view), rows.cuts, sep="\n", flush=True)
        return records, rows

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
