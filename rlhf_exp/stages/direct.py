"""dpo and kto: the policy learns from comparisons themselves, without a reward model and without sampling.

Rafailov et al. 2023, Ethayarajh et al. 2024. The policy starts as the SFT adapter and the reference is that adapter,
frozen; with adapters.sft=base it is the base. TRL computes the losses (direct_trainer.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.data.load import statistics
from rlhf_exp.data.pairs import Pair, pairs_of
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.scoring import answer_logprobs, answers, dealt, hidden_before
from rlhf_exp.schema import DPORun, Generation, KTORun
from rlhf_exp.stages import checkpoint, microbatch, reward_eval, sft, supervised
from rlhf_exp.stages.context import ADAPTER, Context
from rlhf_exp.stages.optim import adamw, schedule
from rlhf_exp.stages.written import rows_of, written

SHOW = (("train/loss", "loss", ".3f"), ("rewards/margins", "margin", ".3f"), ("optim/lr", "lr", ".1e"))
# TRL's names, the same for both; kl is KTO's estimate, accuracies are DPO's
NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "optim/lr",
    "kl": "train/kl",
    "num_tokens": "train/tokens",
} | {
    name: name
    for name in (
        *("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
        *("logps/chosen", "logps/rejected"),
    )
}
PLAIN = Generation(logprob_mode="raw")  # log-probs of the untouched distribution


def run(config: DPORun | KTORun, context: Context) -> dict[str, float]:
    """Train the policy adapter; publish it; report how it orders held-out pairs."""
    from rlhf_exp.stages import direct_trainer  # imports TRL: seconds

    base = context.base
    _, tokens = context.read(config.dataset, "comparisons", "train")
    held, held_tokens = context.read(config.dataset, "comparisons", "validation")
    pairs = pairs_of(tokens)
    if len(pairs) < 2:
        raise InputError(
            f"dataset {config.dataset.name} has {len(pairs)} comparisons to train on: two at least"
        )
    config = microbatch.settle(config, context, *microbatch.parts_of(pairs))
    steps = supervised.steps_of(config.train, len(pairs))
    found = checkpoint.newest(context)
    with (
        Roles(base, config.memory.gradient_checkpointing) as roles,
        supervised.as_before(base),
        supervised.trainer_arguments(config, base, steps) as arguments,
        context.log(config.stage, steps, SHOW, found) as log,
    ):
        # a batch is a step: the trainer takes it apart by itself
        arguments |= {
            "per_device_train_batch_size": config.train.batch_size,
            "gradient_accumulation_steps": 1,
        }
        reference = put_roles(config, context, roles)
        weights = roles.parameters("policy")
        optimizer = adamw(weights, config.optim, config.strategy)
        scheduler = schedule(optimizer, config.optim, steps)
        options = {"optimizers": (optimizer, scheduler), "callbacks": [supervised.LogTo(log, NAMES)]}
        with roles.use("policy"):
            trainer = direct_trainer.build(config, arguments, roles, reference, pairs, **options)
            parts = {"policy": weights}, optimizer, scheduler
            loss = supervised.train(trainer, parts, context, log, steps, found)
        base.model.eval()
        log.finish_steps()
        log.samples(steps, sft.samples(config, context, lambda: roles.use("policy"), tokens.prompts))
        metrics: dict[str, float] = {}
        if held:
            beta = config.dpo.beta if isinstance(config, DPORun) else config.kto.beta
            size = 2 * config.train.micro_batch_size
            rewards = implicit_rewards(roles, reference, pairs_of(held_tokens), beta, size)
            metrics = reward_eval.publish(context, held, rewards)
        with context.folder.publish(ADAPTER) as folder:
            roles.save("policy", folder)
    metrics |= {"train/loss": loss, "data/pairs": float(len(pairs))}
    return metrics | statistics(config.dataset, "comparisons").metrics() | tokens.cuts.metrics()


def put_roles(config: DPORun | KTORun, context: Context, roles: Roles) -> str | None:
    """The policy, and the reference that it starts as; returns the reference's role."""
    sft_folder = context.adapter("sft")
    if sft_folder is None:
        roles.new("policy", lora_config(config.lora, config.model), config.seed)
        return BASE
    roles.load("policy", sft_folder, trainable=True)
    roles.load("ref", sft_folder)
    return "ref"


@torch.no_grad()
def implicit_rewards(
    roles: Roles, reference: str | None, pairs: Sequence[Pair], beta: float, size: int
) -> list[tuple[float, float]]:
    """beta log(policy / reference) of each pair's answers (Rafailov et al. 2023, eq. 5, without its beta log Z).

    That partition function is the same for both answers. Logits in float32, `size` answers at a time.
    """
    eos, prompts = roles.base.eos_id, [pair.prompt for pair in pairs]
    both = [
        (beta * (logprobs(roles, "policy", given, size) - logprobs(roles, reference, given, size))).tolist()
        for given in (
            written(prompts, [pair.chosen for pair in pairs], eos),
            written(prompts, [pair.rejected for pair in pairs], eos),
        )
    ]
    return list(zip(*both, strict=True))


def logprobs(roles: Roles, role: str | None, given: Rollout, size: int) -> Tensor:
    """log p [rows] of whole answers, EOS included where they have one; float64 on the CPU."""
    found = torch.zeros(len(given.prompts), dtype=torch.float64)
    groups = dealt(given, range(len(given.prompts)), size)
    for rows, counts in distributed.turns(groups, roles.base.in_shards):
        batch = answers(rows_of(given, rows), range(len(rows)), roles.base)
        each = answer_logprobs(
            roles.base, hidden_before(roles, role, batch), batch, PLAIN, entropy=False
        ).logprobs
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(
            0, batch.before[0].cpu(), each.double().cpu()
        )
        if counts:
            found[rows] = sums
    distributed.sum_tensors([found])  # each row is one rank's, and 0 with the others
    return found
