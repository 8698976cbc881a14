"""What would make a plan smaller: each lever is another config, planned again; it saves the peaks' difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rlhf_exp.schema import PPORun, RewardRun, Run, Strategy


@dataclass(frozen=True)
class Lever:
    """A setting, and the bytes that the peak of a rank falls by."""

    setting: str
    saving: float
    note: str = ""


LEAST = 0.001  # of the peak, that a lever has to save
Changed = tuple[str, Run, str]  # the setting, the config with it, what to know of it


def levers(
    config: Run, need: Callable[[Run], float], allowed: Callable[[Run], bool], device: str, ranks: int
) -> list[Lever]:
    """Those that save something, the largest first.

    need: bytes of a config's peak on a rank. allowed: whether a changed config would run.
    """
    now = need(config)
    found = [
        Lever(setting, now - need(changed), note)
        for setting, changed, note in _changes(config, device, ranks)
        if allowed(changed)
    ]
    return sorted((lever for lever in found if lever.saving > LEAST * now), key=lambda lever: -lever.saving)


def _changes(config: Run, device: str, ranks: int) -> Iterator[Changed]:
    full, sharded = config.lora.full, config.strategy.name.startswith("zero")
    if hasattr(config, "optim") and not config.memory.gradient_checkpointing:
        memory = replace(config.memory, gradient_checkpointing=True)
        yield "memory.gradient_checkpointing=true", replace(config, memory=memory), "a third more time"
    yield from _smaller_batch(config)
    if hasattr(config, "optim") and device == "cuda" and config.optim.moments == "float32" and not sharded:
        optim = replace(config.optim, moments="8bit")
        yield "optim.moments=8bit", replace(config, optim=optim), "changes the result a little"
    if device == "cuda" and config.model.quantization == "none" and not full:
        changed, setting = (
            replace(config, model=replace(config.model, quantization="4bit")),
            "model.quantization=4bit",
        )
        if config.strategy.name in ("zero3", "zero3_offload"):  # DeepSpeed shards no quantised weights
            changed = replace(changed, strategy=Strategy(name="zero2"))
            setting += " strategy=zero2"
        yield setting, changed, "QLoRA; changes the result"
    if full:
        yield (
            "lora=default",
            replace(config, lora=replace(config.lora, full=False)),
            "an adapter, not all weights",
        )
    for name in ("zero2", "zero3", "zero3_offload"):
        if ranks > 1 and config.strategy.name in ("single", "ddp", "zero1"):
            yield f"strategy={name}", replace(config, strategy=Strategy(name=name)), "more traffic"


def _smaller_batch(config: Run) -> Iterator[Changed]:
    if isinstance(config, PPORun):
        ppo = config.ppo
        size = ppo.micro_batch_size or ppo.batch_size * ppo.samples_per_prompt
        if size > 1:
            new = replace(config, ppo=replace(ppo, micro_batch_size=max(1, size // 4)))
            yield f"ppo.micro_batch_size={max(1, size // 4)}", new, "or 0: as many as fit"
        length = config.dataset.max_prompt_tokens + config.generation.max_new_tokens
        tokens = 2 * length
        if not ppo.micro_batch_tokens and size > 2:
            new = replace(config, ppo=replace(ppo, micro_batch_tokens=tokens))
            yield f"ppo.micro_batch_tokens={tokens}", new, "two of the longest answers, more of short ones"
        if ppo.batch_size > 1:
            new = replace(config, ppo=replace(ppo, batch_size=max(1, ppo.batch_size // 2)))
            yield f"ppo.batch_size={max(1, ppo.batch_size // 2)}", new, "changes the result"
    elif hasattr(config, "train"):
        size = min(config.train.micro_batch_size or config.train.batch_size, config.train.batch_size)
        smaller = next(
            (s for s in range(size // 2, 0, -1) if config.train.batch_size % s == 0 and s <= size // 4), 1
        )
        if size > smaller:
            new = replace(config, train=replace(config.train, micro_batch_size=smaller))
            yield f"train.micro_batch_size={smaller}", new, "or 0: as many as fit"
        if isinstance(config, RewardRun) and size > 2:
            tokens = 2 * (config.dataset.max_prompt_tokens + 2 * config.dataset.max_response_tokens)
            new = replace(config, reward=replace(config.reward, micro_batch_tokens=tokens))
            yield f"reward.micro_batch_tokens={tokens}", new, "two of the longest pairs, more of short ones"
