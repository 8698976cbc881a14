"""micro_batch_size=0: as many rows a forward as fit, once the base is loaded and the data's lengths are known.

The memory plan says how many these are; on CUDA they are then tried out, and halved until they pass. How a batch is
cut changes no result. Where the size is given, it is looked at whether it fits.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from rlhf_exp import distributed
from rlhf_exp.data.pairs import Pair
from rlhf_exp.errors import InputError
from rlhf_exp.memory import architecture, counted, free, parts
from rlhf_exp.memory.counted import Facts, Item
from rlhf_exp.memory.table import gigabytes
from rlhf_exp.model import shapes
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.schema import DPORun, KTORun, PPORun, RewardRun, RFTRun, Run, stage_of
from rlhf_exp.stages import memory, second_models
from rlhf_exp.stages.context import Context
from rlhf_exp.stages.preflight import targets_of

if TYPE_CHECKING:
    from rlhf_exp.model.base import Base

# of what is free: allocators lose some of it between blocks, and a CPU's keeps what was freed (model/pages.py)
MARGIN = {"cpu": 0.75, "cuda": 0.9}
R = TypeVar("R", bound=Run)
Ids = Sequence[Sequence[int]]


def settle(config: R, context: Context, prompts: Ids | None = None, answers: Ids | None = None) -> R:
    """The config with a micro-batch size that fits. InputError where what it asks for does not, with what helps.

    prompts, answers: of the data, whose longest are planned for; None: the limits in the config. To be called before
    anything but the base is loaded.
    """
    facts = facts_here(config, context)
    planned = shortened(config, prompts, answers)
    room = memory.room_of(config, facts.device)
    held = sum(item.bytes for item in parts.items(config, facts) if already(item))
    if config.memory.gb is not None:  # of the whole device, the base included
        held = 0.0
    if size_of(config):
        if not isinstance(config, PPORun):  # which its self-check looks at
            need = memory.need_of(planned, facts) - held
            distributed.agree(lambda: _require(need, room, planned, facts, context))
        return config
    candidates = free.sizes(rows_of(config, facts), whole=not isinstance(config, PPORun))

    def need_of(size: int) -> float:
        return memory.need_of(sized(planned, size), facts) - held

    chosen = free.largest(candidates, need_of, None if room is None else MARGIN[facts.device] * room)
    if facts.device == "cuda":
        planned, smaller = sized(planned, chosen), [size for size in candidates if size <= chosen]
        chosen = distributed.agree(lambda: tried_out(planned, context, smaller, facts))
    chosen = min(distributed.gather(chosen))
    room_said = "" if room is None else f" of {gigabytes(room)}"
    print(
        f"micro-batch: {chosen} of {candidates[0]} rows, {gigabytes(max(need_of(chosen), 0.0))}{room_said} by the "
        "memory plan",
        flush=True,
    )
    return sized(config, chosen)


def _require(need: float, room: float | None, config: Run, facts: Facts, context: Context) -> None:
    """InputError where it does not fit here: one rank's machine may have less than another's."""
    if room is not None and need > room:
        raise InputError(f"{config.stage} {memory.short(need, room, config, facts, context.typed)}")


def already(item: Item) -> bool:
    """Whether it is there once the base is loaded, before the stage begins."""
    return (
        item.kind in (counted.LIBRARIES, counted.PARAMETERS)
        and item.role in ("base", "process")
        and not item.label
    )


def facts_here(config: Run, context: Context) -> Facts:
    """Of a stage about to run, from its loaded base and its parents."""
    base = context.base
    folder, dtype, device = base.path, str(base.dtype).removeprefix("torch."), base.device.type
    weights = shapes.of_model(folder) if any(folder.glob("*.safetensors")) else shapes.of_config(folder)
    model = architecture.of_folder(folder, weights)
    return Facts(
        model=model,
        dtype=dtype,
        device=device,
        targets=tuple(targets_of(config.lora, config.model)),
        scorers=tuple(role for role in context.parents if stage_of(role) == "reward"),
        reference=context.adapter("sft") is not None,
        beside=second_models.of_config(config, model, dtype, device),
        ranks=distributed.world_size(),
    )


def parts_of(pairs: Sequence[Pair]) -> tuple[Ids, Ids]:
    """The prompts and the answers of comparisons."""
    return [pair.prompt for pair in pairs], [answer for pair in pairs for answer in pair[1:]]


def shortened(config: R, prompts: Ids | None, answers: Ids | None) -> R:
    """The config with the data's longest prompt and answer as its limits."""
    names = {"max_prompt_tokens": prompts, "max_response_tokens": answers}
    longest = {name: max(map(len, rows), default=1) for name, rows in names.items() if rows is not None}
    return replace(config, dataset=replace(config.dataset, **longest))


def size_of(config: Run) -> int:
    """The micro-batch size that the config has; 0: to be found."""
    return config.ppo.micro_batch_size if isinstance(config, PPORun) else config.train.micro_batch_size


def sized(config: R, size: int) -> R:
    if isinstance(config, PPORun):
        return replace(config, ppo=replace(config.ppo, micro_batch_size=size))
    return replace(config, train=replace(config.train, micro_batch_size=size))


def rows_of(config: Run, facts: Facts) -> int:
    """The most rows (pairs) of a forward: a batch's, or a minibatch's of PPO; on one rank."""
    if isinstance(config, PPORun):
        rows = config.ppo.batch_size * config.ppo.samples_per_prompt // config.ppo.minibatches
        return math.ceil(rows / facts.ranks)
    return config.train.batch_size


def tried_out(config: Run, context: Context, candidates: Sequence[int], facts: Facts) -> int:
    """The first of the sizes that a forward and backward of the longest rows gets through on the device."""
    import torch

    def recover() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    try:
        return free.tried(
            candidates,
            lambda size: attempt(sized(config, size), context.base, size, facts),
            torch.cuda.OutOfMemoryError,
            recover,
        )
    except free.OutOfMemory:
        room = memory.room_of(config, facts.device) or 0.0
        need = memory.need_of(sized(config, 1), facts)
        raise InputError(
            f"{config.stage}: one row did not fit: it {memory.short(need, room, config, facts, context.typed)}"
        ) from None


def attempt(config: Run, base: Base, size: int, facts: Facts) -> None:
    """What a micro-batch holds: activations and gradients by computing them, all else as empty bytes."""
    import torch

    tried = (counted.KEPT, counted.PASSING)
    here = ("base", "process")
    beside = [item for item in memory.rank_of(config, facts).device if item.role not in here]
    asked = sum(i.bytes for i in beside if i.kind not in tried and i.there(counted.FORWARD))
    filler = torch.empty(int(asked), dtype=torch.uint8, device=base.device)
    sampled = isinstance(config, PPORun | RFTRun)
    answer = config.generation.max_new_tokens if sampled else config.dataset.max_response_tokens
    length = config.dataset.max_prompt_tokens + answer
    rows = size * (2 if isinstance(config, RewardRun | DPORun | KTORun) else 1)  # both answers of a pair
    ids = torch.full((rows, length), base.eos_id, device=base.device)
    with Roles(base, config.memory.gradient_checkpointing) as roles:
        role = None
        if config.lora.full:
            base.model.requires_grad_(True)
        else:
            role = "trial"
            roles.new(role, lora_config(config.lora, config.model), 0)
        try:
            roles.trunk(role, ids).float().square().mean().backward()
        finally:
            base.model.requires_grad_(False)
            base.model.zero_grad(set_to_none=True)
    del filler
