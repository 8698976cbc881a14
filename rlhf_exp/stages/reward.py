"""The reward model: LoRA and a scalar head on the shared base, Bradley-Terry loss (Ouyang et al. 2022, eq. 1).

The score is the head's number at the last real token, EOS included: the same in evaluation and PPO, and in training,
where `reward.loss=token_wise` compares the numbers at earlier tokens too. A pair's prompt is computed once, where the
model allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from rlhf_exp.data.load import statistics
from rlhf_exp.data.pairs import Pair, pairs_of
from rlhf_exp.data.records import Comparison
from rlhf_exp.model.base import Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.probes import negatives
from rlhf_exp.progress import Progress
from rlhf_exp.rewards.pairs import cannot_share, score_pairs
from rlhf_exp.schema import RewardRun
from rlhf_exp.stages import checkpoint, microbatch, probe, reward_eval, reward_faults, supervised
from rlhf_exp.stages.centring import center
from rlhf_exp.stages.context import ADAPTER, HEAD, HEAD_FILE, Context
from rlhf_exp.stages.margins import margins_of
from rlhf_exp.stages.optim import adamw, schedule
from rlhf_exp.stages.pair_trainer import PairTrainer, RewardModel

SHOW = (("train/loss", "loss", ".3f"), ("train/accuracy", "accuracy", ".2f"), ("optim/lr", "lr", ".1e"))
NAMES = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "grad_norm": "train/grad_norm",
    "learning_rate": "optim/lr",
}


def run(config: RewardRun, context: Context) -> dict[str, float]:
    """Train adapter and head; publish both; report accuracy beside the length-only baseline."""
    base = context.base
    reward_faults.require(config.reward)
    reward_faults.announce(config.reward)
    rows, tokens, pairs = {}, {}, {}
    for split in ("train", "validation"):
        rows[split], encoded = context.read(config.dataset, "comparisons", split)
        if split == "train":
            rows[split], encoded = negatives.added(
                base.tokenizer, config.dataset, rows[split], encoded, config.reward, config.seed
            )
        tokens[split] = reward_faults.tokenised(config.reward, encoded, base.eos_id)
        pairs[split] = pairs_of(tokens[split])
    config = microbatch.settle(config, context, *microbatch.parts_of(pairs["train"]))
    steps = supervised.steps_of(config.train, len(pairs["train"]))
    found = checkpoint.newest(context)
    with (
        Roles(base, config.memory.gradient_checkpointing) as roles,
        supervised.as_before(base),
        supervised.trainer_arguments(config, base, steps) as arguments,
        context.log("reward", steps, SHOW, found) as log,
    ):
        roles.new("reward", lora_config(config.lora, config.model), config.seed)
        head = ScalarHead(base.hidden_size).reset(config.seed).to(base.device)
        # differences say nothing of the bias: it would follow rounding errors, which Adam takes for a gradient
        head.bias.requires_grad_(config.reward.center_coef > 0)
        model = RewardModel(roles, head, share=shares(config, base))
        weights = {"reward": roles.parameters("reward"), "head": list(head.parameters())}
        optimizer = adamw([*weights["reward"], *weights["head"]], config.optim, config.strategy)
        scheduler = schedule(optimizer, config.optim, steps)
        trainer = trainer_of(config, model, pairs["train"], rows["train"], arguments)
        trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler
        trainer.add_callback(supervised.LogTo(log, NAMES))
        loss = supervised.train(trainer, (weights, optimizer, scheduler), context, log, steps, found)
        base.model.eval()
        log.finish_steps()
        if config.reward.center:
            center(config, context, roles, head, rows["train"], pairs["train"])
        metrics: dict[str, float] = {}
        scores: list[tuple[float, float]] = []
        if pairs["validation"]:
            size, most = 2 * config.train.micro_batch_size, config.reward.micro_batch_tokens
            with Progress("score", len(pairs["validation"])) as shown:
                given = pairs["validation"], size, most, model.share
                scores = score_pairs(roles, "reward", head, *given, lambda done: shown.update(done, {}))
            metrics = reward_eval.publish(context, rows["validation"], scores)
            log.samples(steps, reward_eval.samples(rows["validation"], scores))
        with context.folder.publish(ADAPTER) as folder:
            roles.save("reward", folder)
        with context.folder.publish(HEAD) as folder:
            head.save(folder / HEAD_FILE)
    metrics |= {"train/loss": loss, "data/pairs": float(len(pairs["train"]))}
    metrics |= probe.at_the_end(config, context, scores)
    return metrics | statistics(config.dataset, "comparisons").metrics() | tokens["train"].cuts.metrics()


def trainer_of(
    config: RewardRun,
    model: RewardModel,
    pairs: Sequence[Pair],
    rows: Sequence[Comparison],
    arguments: dict[str, Any],
) -> PairTrainer:
    """The trainer on these pairs, without optimiser and without anything on the screen."""
    # a batch is a step: the trainer takes it apart by itself
    arguments |= {"per_device_train_batch_size": config.train.batch_size, "gradient_accumulation_steps": 1}
    trainer = PairTrainer(
        config.reward,
        pairs,
        margins_of(config.reward, rows),
        config.train.micro_batch_size,
        config.reward.micro_batch_tokens,
        model=model,
        args=supervised.on_one_device(TrainingArguments(**arguments)),
    )
    trainer.in_shards = model.in_shards
    supervised.without_printing(trainer)
    return trainer


def shares(config: RewardRun, base: Base) -> bool:
    """Whether prompts are computed once; says where they cannot be."""
    if not config.reward.share_prompts:
        return False
    reason = cannot_share(base)
    if reason is not None:
        print(
            f"prompts are computed for each answer again: this model cannot share them: {reason}", flush=True
        )
    return reason is None
