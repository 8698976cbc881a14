"""What the stages on transformers' Trainer (sft, reward, dpo, kto) share: its arguments and where its logs go."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from rlhf_exp import distributed
from rlhf_exp.model.base import Base
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import DPORun, KTORun, RewardRun, SFTRun, Train
from rlhf_exp.stages import checkpoint
from rlhf_exp.stages.checkpoint import Checkpoint, Keeper
from rlhf_exp.stages.context import Context
from rlhf_exp.tracking import RunLog

TRAINER_STATE = "trainer_state.json"  # transformers' own name for it


def steps_of(train: Train, rows: int) -> int:
    """Optimiser steps of the stage; the last batch of an epoch may be smaller."""
    return train.steps or math.ceil(train.epochs * math.ceil(rows / train.batch_size))


@contextmanager
def trainer_arguments(
    config: SFTRun | RewardRun | DPORun | KTORun, base: Base, steps: int
) -> Iterator[dict[str, Any]]:
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


def a_batch_a_step(train: Train) -> dict[str, int]:
    """Of trainer_arguments, where the trainer takes a batch apart by itself."""
    return {"per_device_train_batch_size": train.batch_size, "gradient_accumulation_steps": 1}


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


class AfterLog(TrainerCallback):
    """After each step's log, when all that belongs to the step is done: the keeper's turn."""

    def __init__(self, keeper: Keeper):
        self.keeper = keeper

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:  # not the summary at the end
            state.log_history.clear()  # it would grow by a row a step, in each checkpoint
            self.keeper.after(state.global_step)


class GoOn(TrainerCallback):
    """Gives the Trainer's counters the values of the checkpoint: it sets them to 0 just before this call."""

    def __init__(self, trainer: Any, loss: float):
        self.trainer, self.loss = trainer, loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._total_loss_scalar = self.loss
        self.trainer._initial_global_step = 0


class DrawByRank(TrainerCallback):
    """Each rank draws its own dropout, from the seed and the step: a resume draws the same."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        key = row_key(args.seed, state.global_step, distributed.rank())
        torch.manual_seed(key % 2**63)


Parts = tuple[Mapping[str, Sequence[Tensor]], torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def train(trainer: Any, parts: Parts, context: Context, log: RunLog, steps: int, found: Checkpoint) -> float:
    """Train from `found` to the last step; the mean loss over all steps.

    Weights, optimiser and generators go back from our checkpoint; the Trainer, which finds its place in the data by
    the number of steps alone, is told that number, and to read nothing itself. `_total_train_tokens` is SFTTrainer's.
    """

    def snapshot() -> dict[str, Any]:
        more = {"loss": trainer._total_loss_scalar, "trainer": dataclasses.asdict(trainer.state)}
        return checkpoint.state_of(*parts) | more | {"tokens": getattr(trainer, "_total_train_tokens", 0)}

    total = 0.0
    if found.step:
        total = found.tree["loss"]
        checkpoint.put_back(found.tree, *parts)
        go_on(trainer, found.tree)
    if found.step < steps:
        with Keeper(context, steps, log, snapshot) as keeper:
            trainer.add_callback(AfterLog(keeper))
            if distributed.world_size() > 1:
                trainer.add_callback(DrawByRank())
            trainer.train(resume_from_checkpoint=trainer.args.output_dir if found.step else None)
        total = trainer._total_loss_scalar
    return total / steps


def go_on(trainer: Any, tree: dict[str, Any]) -> None:
    """Make `train(resume_from_checkpoint=...)` continue after the step of the checkpoint."""
    (Path(trainer.args.output_dir) / TRAINER_STATE).write_text(json.dumps(tree["trainer"]))
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tree["tokens"]
    for reads in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler"):
        setattr(trainer, reads, lambda *_, **__: None)
    # called where the generators have to be as they were: after it has found its place in the data
    trainer._load_rng_state = lambda _: checkpoint.set_random_state(tree["random"])
    trainer.add_callback(GoOn(trainer, tree["loss"]))


def without_printing(trainer: Any) -> None:
    """Take off the callbacks that print every log line to the screen."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


@contextmanager
def as_before(base: Base) -> Iterator[None]:
    """Undo what a Trainer does to the shared model: a forward of its own, marks, configs, training mode, PAD."""
    owners = (base.model, base.model.config, base.model.generation_config)
    changed = [(owner.__dict__, dict(owner.__dict__)) for owner in owners if owner is not None]
    pad = base.tokenizer.pad_token
    try:
        yield
    finally:
        for attributes, before in changed:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        if base.tokenizer.pad_token != pad:
            base.tokenizer.pad_token = pad
        base.model.eval()


def dataset_of(**columns: list[Any]) -> Any:
    """A `datasets.Dataset` in memory."""
    from datasets import Dataset

    return Dataset.from_dict(columns)
