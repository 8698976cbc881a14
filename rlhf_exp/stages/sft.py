"""Supervised fine-tuning, on TRL's SFTTrainer: the loss counts the response's tokens and its EOS.

Ouyang et al. 2022, step 1. The adapter goes onto the shared base and is taken off again afterwards. With lora.full
all weights are trained and published as a model, which is then the base of the later stages.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rlhf_exp import distributed
from rlhf_exp.data.load import statistics
from rlhf_exp.model.quiet import no_progress_bars
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.rollout.engine import generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import Generation, SFTRun
from rlhf_exp.stages import checkpoint, microbatch, supervised
from rlhf_exp.stages.context import ADAPTER, MODEL, Context
from rlhf_exp.stages.optim import adamw, schedule

if TYPE_CHECKING:
    from torch.nn import Parameter

    from rlhf_exp.model.base import Base

SHOW = (("train/loss", "loss", ".3f"), ("train/token_accuracy", "accuracy", ".2f"), ("optim/lr", "lr", ".1e"))
NAMES = {
    "loss": "train/loss",
    "mean_token_accuracy": "train/token_accuracy",
    "entropy": "train/entropy",
    "grad_norm": "train/grad_norm",
    "learning_rate": "optim/lr",
    "num_tokens": "train/tokens",
}
IGNORED = -100  # label of a token that does not count
SAMPLES = 4  # answers written at the end


def run(config: SFTRun, context: Context) -> dict[str, float]:
    """Train the policy adapter; publish it."""
    from trl import SFTConfig, SFTTrainer

    base = context.base
    records, rows = context.read(config.dataset, "demonstrations", "train")
    pairs = list(zip(rows.prompts, rows.answers["response"], strict=True))
    data = supervised.dataset_of(
        input_ids=[prompt + response for prompt, response in pairs],
        labels=[[IGNORED] * len(prompt) + response for prompt, response in pairs],
    )
    config = microbatch.settle(config, context, rows.prompts, rows.answers["response"])
    steps = supervised.steps_of(config.train, len(records))
    found = checkpoint.newest(context)
    with (
        Roles(base, config.memory.gradient_checkpointing) as roles,
        supervised.as_before(base),
        supervised.trainer_arguments(config, base, steps) as arguments,
        context.log("sft", steps, SHOW, found) as log,
    ):
        role = BASE if config.lora.full else "policy"
        weights = trainable(config, base, roles)
        optimizer = adamw(weights, config.optim, config.strategy)
        scheduler = schedule(optimizer, config.optim, steps)
        kind = SFTTrainer
        if distributed.world_size() > 1:  # a batch is a step, of which each rank takes its rows
            from rlhf_exp.stages.sft_steps import SFTSteps as kind

            arguments |= supervised.a_batch_a_step(config.train)
        # max_length: the templates cut, and count what they cut
        arguments = supervised.on_one_device(SFTConfig(**arguments, max_length=None, pad_to_multiple_of=None))
        with roles.use(role):
            trainer = kind(
                model=base.model,
                args=arguments,
                train_dataset=data,
                processing_class=base.tokenizer,
                optimizers=(optimizer, scheduler),
                callbacks=[supervised.LogTo(log, NAMES)],
            )
            trainer.size, trainer.in_shards = config.train.micro_batch_size, base.in_shards
            supervised.without_printing(trainer)
            parts = {"policy": weights}, optimizer, scheduler
            loss = supervised.train(trainer, parts, context, log, steps, found)
        base.model.requires_grad_(False).eval()
        log.samples(steps, samples(config, context, lambda: roles.use(role), rows.prompts))
        if config.lora.full:
            with context.folder.publish(MODEL) as folder, no_progress_bars():
                base.model.save_pretrained(folder)
                base.tokenizer.save_pretrained(folder)
        else:
            with context.folder.publish(ADAPTER) as folder:
                roles.save(role, folder)
    metrics = {"train/loss": loss, "data/rows": float(len(records))}
    return metrics | statistics(config.dataset, "demonstrations").metrics() | rows.cuts.metrics()


def trainable(config: SFTRun, base: Base, roles: Roles) -> list[Parameter]:
    """A new adapter's weights, or all of the base's."""
    if config.lora.full:
        return list(base.model.requires_grad_(True).parameters())
    roles.new("policy", lora_config(config.lora, config.model), config.seed)
    return roles.parameters("policy")


def samples(
    config: SFTRun,
    context: Context,
    role: Callable[[], AbstractContextManager[None]],
    prompts: list[list[int]],
) -> list[dict[str, object]]:
    """A few answers of the trained policy to training prompts, to read."""
    chosen = prompts[:SAMPLES]
    keys = [row_key(config.seed, 0, i) for i in range(len(chosen))]
    generation = Generation(max_new_tokens=min(64, config.dataset.max_response_tokens))
    rollout = generate(context.base, role, chosen, keys, generation)
    decode = context.base.tokenizer.batch_decode
    texts = zip(decode(rollout.prompts), decode(rollout.responses, skip_special_tokens=True), strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in texts]
