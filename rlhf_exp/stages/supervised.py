"""What the two stages on transformers' Trainer (sft, reward) share: its arguments and where its logs go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from rlhf_exp.model.base import Base
from rlhf_exp.schema import RewardRun, SFTRun, Train
from rlhf_exp.tracking import RunLog


def steps_of(train: Train, rows: int) -> int:
    """Optimiser steps of the stage; the last batch of an epoch may be smaller."""
    return train.steps or math.ceil(train.epochs * math.ceil(rows / train.batch_size))


@contextmanager
def trainer_arguments(config: SFTRun | RewardRun, base: Base, steps: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments of TrainingArguments; its output folder is temporary, since we save by ourselves."""
    micro = min(config.train.micro_batch_size, config.train.batch_size)
    with TemporaryDirectory() as folder:
        yield {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": config.train.batch_size // micro,
            "max_grad_norm": config.optim.max_grad_norm,
            "seed": config.seed,
            "data_seed": config.seed,
            "use_cpu": base.device.type == "cpu",
            "bf16": False,  # the base is loaded in its dtype; autocast would cast a second time
            "activation_checkpointing": False,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": base.device.type == "cuda",
            "remove_unused_columns": False,
        }


def on_one_device(arguments: Any) -> Any:
    """The same arguments, for one device: transformers would spread the model over every CUDA device it sees."""
    _ = arguments.device  # finds the devices
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


class LogTo(TrainerCallback):
    """Sends the Trainer's numbers of each step to our log, under our names; the others are left out."""

    def __init__(self, log: RunLog, names: Mapping[str, str]):
        self.log, self.names = log, names

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        found = {ours: logs[theirs] for theirs, ours in self.names.items() if logs and theirs in logs}
        if found:
            self.log.step(state.global_step, {name: float(value) for name, value in found.items()})


def without_printing(trainer: Any) -> None:
    """Take off the callbacks that print every log line to the screen."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


@contextmanager
def as_before(base: Base) -> Iterator[None]:
    """Undo what a Trainer does to the shared model: a forward of its own, marks, config entries, training mode."""
    changed = [(owner.__dict__, dict(owner.__dict__)) for owner in (base.model, base.model.config)]
    try:
        yield
    finally:
        for attributes, before in changed:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        base.model.eval()


def dataset_of(**columns: list[Any]) -> Any:
    """A `datasets.Dataset` in memory."""
    from datasets import Dataset

    return Dataset.from_dict(columns)
