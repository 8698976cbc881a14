"""What a strategy needs of a config and a machine, before anything is loaded; and that all ranks see the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rlhf_exp import distributed
from rlhf_exp.errors import InputError
from rlhf_exp.fields import did_you_mean, leaves
from rlhf_exp.schema import DPORun, KTORun, PPORun, RewardRun, Run
from rlhf_exp.strategies import settings
from rlhf_exp.strategies.settings import KEY

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Plan

ZERO = "zero"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}
BATCH, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
# sections of DeepSpeed's that say what our keys say
OURS = {
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "memory.gradient_checkpointing",
    "checkpoint": "checkpoint_every",
    "data_types": "model.dtype",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "comet": "tracking",
    "csv_monitor": "tracking",
}
# what may be set, beside the four that are compared with ours
FREE = ("zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor")
FREE += ("comms_logger", "wall_clock_breakdown", "memory_breakdown", "dump_state", "aio", "steps_per_print")
COMPARED = (BATCH, MICRO, STEPS, "gradient_clipping")


def shards(config: Run) -> bool:
    """Whether DeepSpeed has a part in it."""
    return config.strategy.name.startswith(ZERO)


def config_problems(config: Run, ranks: int) -> Iterator[str]:
    """Of the command's own config."""
    name, given = config.strategy.name, config.strategy.deepspeed
    if ranks > 1 and name == "single":
        yield (
            f"{ranks} processes were started as ranks of one run, but strategy=single is one process: choose "
            "strategy=ddp (or zero1, zero2, zero3), or start it without torchrun"
        )
    if given and name not in STAGES:
        yield f"{KEY} is for strategy=zero1, zero2 and zero3, but strategy={name}: leave it out"
        return
    if name not in STAGES:
        return
    if importlib.util.find_spec("deepspeed") is None:
        yield (
            f"strategy={name} needs the package deepspeed, which is not installed: pip install deepspeed, or choose "
            "strategy=ddp"
        )
        return
    yield from _keys(config, given)
    yield from settings.value_problems(given)
    yield from _batches(config, given, ranks)
    zero = given.get("zero_optimization") or {}
    yield from _zero(config, zero)
    if isinstance(zero, Mapping):
        yield from settings.combination_problems(given, zero, STAGES[name])


def _keys(config: Run, given: Mapping[str, Any]) -> Iterator[str]:
    for key in given:
        if key in OURS:
            yield f"{KEY}.{key} is ours to say: set {OURS[key]}, and leave it out"
        elif key not in (*FREE, *COMPARED):
            yield f"unknown key {KEY}.{key}{did_you_mean(key, [*FREE, *COMPARED])}"
    clip, norm = given.get("gradient_clipping"), getattr(config, "optim", None)
    if clip is not None and norm is not None and clip != norm.max_grad_norm:
        yield f"{KEY}.gradient_clipping={clip} contradicts optim.max_grad_norm={norm.max_grad_norm:g}: set that alone"


def _batches(config: Run, given: Mapping[str, Any], ranks: int) -> Iterator[str]:
    """micro x accumulation x ranks is the batch of an optimiser step, whoever says it."""
    if not any(key in given for key in (BATCH, MICRO, STEPS)):
        return
    found = batch_of(config)
    if found is None:
        yield f"{KEY}: stage {config.stage} has no batches: leave out {', '.join((BATCH, MICRO, STEPS))}"
        return
    key, batch, own_key, own = found
    for theirs in (BATCH, MICRO, STEPS):
        if theirs in given and (not isinstance(given[theirs], int) or given[theirs] < 1):
            yield f"{KEY}.{theirs} must be a whole number from 1 on, got {given[theirs]!r}"
            return
    micro = given.get(MICRO, own)
    if micro != own:
        yield f"{KEY}.{MICRO}={micro} contradicts {own_key}={own}: set that alone"
    if given.get(BATCH, batch) != batch:
        yield f"{KEY}.{BATCH}={given[BATCH]} contradicts {key}, which says {batch}"
    if STEPS in given and not micro:
        yield f"{KEY}.{STEPS} says how a batch is cut, which {own_key}=0 finds out: leave one of them out"
    elif STEPS in given and micro * given[STEPS] * ranks != batch:
        yield (
            f"{KEY}: micro {micro} x accumulation {given[STEPS]} x ranks {ranks} = {micro * given[STEPS] * ranks}, "
            f"{key} says {batch}"
        )


def batch_of(config: Run) -> tuple[str, int, str, int] | None:
    """The key of the rows of an optimiser step, how many these are; the key of a forward's rows, and how many."""
    if isinstance(config, PPORun):
        ppo = config.ppo
        rows = ppo.batch_size * ppo.samples_per_prompt // ppo.minibatches
        parts = [("batch_size", True), ("samples_per_prompt", ppo.samples_per_prompt > 1)]
        key = " x ".join(f"ppo.{name}" for name, counts in parts if counts)
        key += " / ppo.minibatches" if ppo.minibatches > 1 else ""
        return key, rows, "ppo.micro_batch_size", ppo.micro_batch_size
    train = getattr(config, "train", None)
    if train is None:
        return None
    return "train.batch_size", train.batch_size, "train.micro_batch_size", train.micro_batch_size


def _zero(config: Run, zero: Any) -> Iterator[str]:
    """DeepSpeed's own section."""
    name = config.strategy.name
    if not isinstance(zero, Mapping):
        yield f"{KEY}.zero_optimization must hold settings such as {{stage: 2}}, got {zero!r}"
        return
    if numbers := [key for key in zero if not isinstance(key, str)]:
        yield from (f"unknown key {KEY}.zero_optimization.{key}" for key in numbers)
        return
    yield from settings.stage_problem(zero.get("stage", STAGES[name]), STAGES[name], name)
    yield from settings.section_problems(zero, STAGES[name], name)
    sections = {part: zero.get(part) for part in settings.OFFLOADS}
    for part, section in sections.items():
        if isinstance(section, Mapping) and section.get("device") == "nvme":
            key = f"{KEY}.zero_optimization.{part}"
            yield from [*_folder(f"{key}.nvme_path", section.get("nvme_path"))] or _aio(key)
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except Exception as error:  # a package that is there and cannot be used says anything
        reason = str(error).strip().partition("\n")[0]
        yield f"strategy={name} needs the package deepspeed, which cannot be imported: {reason}"
        return
    try:
        told = ["stage", *(part for part, section in sections.items() if not isinstance(section, Mapping))]
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if key not in told})
    except ValueError as error:  # pydantic's own is one
        for problem in error.errors():
            place = ".".join(map(str, ("zero_optimization", *problem["loc"])))
            yield f"{KEY}.{place}: {problem['msg']}, got {problem['input']!r}"


def _aio(key: str) -> Iterator[str]:
    """DeepSpeed's asynchronous files, an op that is compiled."""
    try:
        with distributed.environment():
            from deepspeed.ops.op_builder import AsyncIOBuilder

            there = AsyncIOBuilder().is_compatible(verbose=False)
    except Exception:  # what is looked for, a compiler and libaio, may fail in any way
        there = False
    if not there:
        yield (
            f"{key}.device=nvme needs DeepSpeed's async_io, which cannot be built here (libaio's headers and a "
            "compiler): device=cpu"
        )


def _folder(key: str, given: Any) -> Iterator[str]:
    """A folder of a fast disk that shards are written to."""
    if not given:
        yield f"{key} is not set: device=nvme needs a folder on a fast disk"
        return
    folder = Path(str(given)).expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        yield f"{key}={given} cannot be written: {there} is no folder"
        return
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield f"{key}={given} cannot be written: {there}: {error.strerror or error}"


def stage_problems(config: Run, ranks: int) -> Iterator[str]:
    """Of the config of a stage that is to be trained."""
    name = config.strategy.name
    for key, count, what in _shared_out(config):
        if count < ranks:
            yield (
                f"{config.stage}: {ranks} ranks, but {count} {what}{'s' * (count > 1)} in a batch ({key}): each rank "
                "needs one; raise the batch, or start fewer ranks"
            )
            break
    if STAGES.get(name) and config.lora.full:
        yield (
            f"lora.full trains every weight of the base, strategy={name} shards what belongs to adapters: use "
            "strategy=ddp for it"
        )
    if STAGES.get(name) == 3 and config.lora.dora:
        yield f"lora.dora reads whole weights of the base, which strategy={name} has cut up: use zero2"
    if STAGES.get(name) == 3 and config.model.quantization != "none":
        yield (
            f"model.quantization={config.model.quantization} packs weights in a form that strategy={name} cannot "
            "shard: use zero2"
        )


def _shared_out(config: Run) -> Iterator[tuple[str, int, str]]:
    """What the ranks share out: the key that says how many there are, how many, and what they are called."""
    if isinstance(config, PPORun):
        yield "ppo.batch_size", config.ppo.batch_size, "prompt"
    if found := batch_of(config):
        key, rows = found[:2]
        yield key, rows, "pair" if isinstance(config, RewardRun | DPORun | KTORun) else "row"


# ---------------------------------------------------------------- the same everywhere


def same_config(config: Run) -> None:
    """InputError, on all ranks, where a rank was started with another config than rank 0."""
    if distributed.world_size() == 1:
        return
    own = {key: repr(value) for key, _, value in leaves(config)}
    found = distributed.gather(own)
    problems = []
    for rank, other in enumerate(found):
        apart = [key for key in {**found[0], **other} if found[0].get(key) != other.get(key)]
        if apart:
            key = apart[0]
            more = f" (and {len(apart) - 1} more keys)" if len(apart) > 1 else ""
            problems.append(
                f"rank {rank} has another config than rank 0: {key}={other.get(key)}, rank 0 has "
                f"{found[0].get(key)}{more}: start all ranks with the same command"
            )
    _raise(problems)


def same_plan(plan: Plan) -> None:
    """InputError, on all ranks, where a rank sees another model, other data or another store than rank 0."""
    if distributed.world_size() == 1:
        return
    facts: dict[str, tuple[str, str]] = {
        "base": (f"another base model ({plan.config.model.name})", f"{plan.base.hash}{plan.base.dtype}")
    }
    for node in plan.nodes:
        for view, digest in node.data.items():
            facts[f"{node.name} {view}"] = (f"other {view} of dataset {node.config.dataset.name}", digest)
        for key, digest in node.functions.items():
            facts[f"{node.name} {key}"] = (f"another {key}", str(digest))
        facts[node.name] = (f"another key of {node.name}", node.key)
        where = "in another state: output_dir must be on a disk that all ranks share"
        facts[f"{node.name} run"] = (f"the run of {node.name} {where}", str(node.found is not None))
    found = distributed.gather(facts)
    problems = []
    for rank, other in enumerate(found):
        # the first in this order that differs is what is behind the others
        apart = [key for key in {**found[0], **other} if found[0].get(key) != other.get(key)]
        if apart:
            what, digest = other.get(apart[0]) or found[0][apart[0]]
            rank_0 = found[0].get(apart[0], ("", ""))[1]
            problems.append(f"rank {rank} sees {what} ({digest[:12]}, rank 0: {rank_0[:12]})")
    _raise(problems)


def _raise(problems: list[str]) -> None:
    if problems:
        error = InputError(problems)
        error.agreed = True
        raise error
