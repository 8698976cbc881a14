"""The reward model: LoRA and a scalar head on the shared base, Bradley-Terry loss (Ouyang et al. 2022, eq. 1).

The score is the head's number at the last real token, EOS included: the same in evaluation and PPO, and in training,
where `reward.loss=token_wise` compares the numbers at earlier tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from rlhf_exp.algorithms.pairwise import (
    centering_loss,
    compared_tokens,
    held,
    pairwise_accuracy,
    pairwise_loss,
    token_wise_loss,
    wilson_interval,
)
from rlhf_exp.data.collate import right_pad
from rlhf_exp.data.load import longer_chosen, statistics
from rlhf_exp.data.records import Comparison
from rlhf_exp.data.tokenised import Tokenised
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.rewards.learned import score_sequences
from rlhf_exp.schema import Reward, RewardRun
from rlhf_exp.stages import checkpoint, supervised
from rlhf_exp.stages.context import ADAPTER, HEAD, HEAD_FILE, Context
from rlhf_exp.stages.optim import adamw, schedule

SHOW = (("train/loss", "loss", ".3f"), ("train/accuracy", "accuracy", ".2f"), ("optim/lr", "lr", ".1e"))
NAMES = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "grad_norm": "train/grad_norm",
    "learning_rate": "optim/lr",
}
CENTRED_ON = 256  # chosen answers whose mean score becomes 0

Pair = tuple[list[int], list[int]]  # ids of prompt + chosen, and of prompt + rejected


def run(config: RewardRun, context: Context) -> dict[str, float]:
    """Train adapter and head; publish both; report accuracy beside the length-only baseline."""
    base = context.base
    rows, tokens, pairs = {}, {}, {}
    for split in ("train", "validation"):
        rows[split], tokens[split] = context.read(config.dataset, "comparisons", split)
        pairs[split] = joined(tokens[split])
    steps = supervised.steps_of(config.train, len(pairs["train"]))
    found = checkpoint.newest(context)
    with (
        Roles(base) as roles,
        supervised.as_before(base),
        supervised.trainer_arguments(config, base, steps) as arguments,
        context.log("reward", steps, SHOW, found) as log,
    ):
        roles.new("reward", lora_config(config.lora, config.model), config.seed)
        head = ScalarHead(base.hidden_size).reset(config.seed).to(base.device)
        # differences say nothing of the bias: it would follow rounding errors, which Adam takes for a gradient
        head.bias.requires_grad_(config.reward.center_coef > 0)
        model = RewardModel(roles, head)
        weights = {"reward": roles.parameters("reward"), "head": list(head.parameters())}
        optimizer = adamw([*weights["reward"], *weights["head"]], config.optim)
        scheduler = schedule(optimizer, config.optim, steps)
        trainer = PairTrainer(
            config.reward,
            model=model,
            args=supervised.on_one_device(TrainingArguments(**arguments)),
            train_dataset=supervised.dataset_of(
                chosen=[chosen for chosen, _ in pairs["train"]],
                rejected=[rejected for _, rejected in pairs["train"]],
            ),
            data_collator=Collate(base.pad_id),
            optimizers=(optimizer, scheduler),
            callbacks=[supervised.LogTo(log, NAMES)],
        )
        supervised.without_printing(trainer)
        loss = supervised.train(trainer, (weights, optimizer, scheduler), context, log, steps, found)
        base.model.eval()
        size = 2 * config.train.micro_batch_size
        if config.reward.center:
            center(roles, head, [pairs["train"][i][0] for i in spread(rows["train"])], size)
        metrics: dict[str, float] = {}
        if pairs["validation"]:
            metrics, scores = evaluate(roles, head, rows["validation"], pairs["validation"], size)
            log.samples(steps, samples(rows["validation"], scores))
        with context.folder.publish(ADAPTER) as folder:
            roles.save("reward", folder)
        with context.folder.publish(HEAD) as folder:
            head.save(folder / HEAD_FILE)
    metrics |= {"train/loss": loss, "data/pairs": float(len(pairs["train"]))}
    return metrics | statistics(config.dataset, "comparisons").metrics() | tokens["train"].cuts.metrics()


def joined(rows: Tokenised) -> list[Pair]:
    """Each prompt with each of its answers."""
    answers = rows.answers["chosen"], rows.answers["rejected"]
    return [(p + c, p + r) for p, c, r in zip(rows.prompts, *answers, strict=True)]


class Collate:
    """Pairs -> ids int64[2b, L] right-padded, first the chosen then the rejected, and lengths int64[2b]."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        sequences = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        ids, lengths = right_pad(sequences, self.pad_id)
        return {"ids": ids, "lengths": lengths}


class RewardModel(nn.Module):
    """Adapter and head as one module, as the Trainer wants it."""

    def __init__(self, roles: Roles, head: ScalarHead):
        super().__init__()
        self.base_model, self.head = roles.base.model, head
        self._roles = roles

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores [2b, L] after every token."""
        return self.head(self._roles.trunk("reward", ids))


class PairTrainer(Trainer):
    """Trainer with the pairwise loss, a mean over all pairs of a step; logs their accuracy beside it."""

    def __init__(self, reward: Reward, **arguments: Any):
        super().__init__(**arguments)
        self.reward = reward
        self.model_accepts_loss_kwargs = (
            True  # compute_loss has the step's number of pairs: nothing to rescale
        )
        self._right, self._pairs = 0.0, 0

    def get_batch_samples(self, *arguments: Any) -> tuple[list[dict[str, Tensor]], int]:
        """The micro-batches of a step and its number of pairs; the last micro-batch may be a small one."""
        batches, _ = super().get_batch_samples(*arguments)
        return batches, sum(len(batch["lengths"]) for batch in batches) // 2

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        scores, lengths = model(**inputs), inputs["lengths"]
        chosen, rejected = scores.gather(1, lengths.unsqueeze(1) - 1).squeeze(1).chunk(2)
        self._right += float(pairwise_accuracy(chosen.detach(), rejected.detach())) * len(chosen)
        self._pairs += len(chosen)
        loss = loss_of(self.reward, scores, inputs["ids"], lengths, num_items_in_batch)
        return (loss, torch.stack([chosen, rejected])) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if self._pairs:
            logs["accuracy"] = self._right / self._pairs
            self._right, self._pairs = 0.0, 0
        super().log(logs, *arguments, **keywords)


def loss_of(reward: Reward, scores: Tensor, ids: Tensor, lengths: Tensor, pairs: int | None) -> Tensor:
    """The loss of b pairs, a share of the mean over `pairs` (None: over these).

    scores [2b, L] after every token, ids int64[2b, L] and lengths int64[2b], first the chosen then the rejected.
    """
    ends = scores.gather(1, lengths.unsqueeze(1) - 1).squeeze(1).chunk(2)
    if reward.loss == "token_wise":
        mask = compared_tokens(*ids.chunk(2), *lengths.chunk(2))
        loss = token_wise_loss(*held(scores, lengths).chunk(2), mask, pairs, reward.label_smoothing)
    else:
        loss = pairwise_loss(*ends, denominator=pairs, label_smoothing=reward.label_smoothing)
    if reward.center_coef:
        loss = loss + reward.center_coef * centering_loss(*ends, denominator=pairs)
    return loss


def spread(rows: Sequence[Comparison]) -> list[int]:
    """At most CENTRED_ON rows of different prompts, by their hash: the file may be sorted."""
    first = {row.id: i for i, row in reversed(list(enumerate(rows)))}
    return [first[id] for id in sorted(first)[:CENTRED_ON]]


def center(roles: Roles, head: ScalarHead, sequences: Sequence[list[int]], size: int) -> None:
    """Shift the bias so that the mean score of `sequences` is 0 (Stiennon et al. 2020, appendix C.1).

    The loss only sees differences, so the constant is free; fixed like this, a score says how much better or worse
    than a typical preferred answer.
    """
    scores = score_sequences(roles, "reward", head, sequences, size)
    with torch.no_grad():
        head.bias -= sum(scores) / len(scores)


def evaluate(
    roles: Roles, head: ScalarHead, rows: Sequence[Comparison], pairs: Sequence[Pair], size: int
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Accuracy with its 95 % interval beside the rule "the longer answer wins" on the same pairs, and the scores."""
    chosen, rejected = (
        torch.tensor(score_sequences(roles, "reward", head, [pair[side] for pair in pairs], size))
        for side in (0, 1)
    )
    accuracy = float(pairwise_accuracy(chosen, rejected))
    low, high = wilson_interval(accuracy * len(pairs), len(pairs))
    metrics = {
        "validation/accuracy": accuracy,
        "validation/accuracy_low": low,
        "validation/accuracy_high": high,
        "validation/length_accuracy": longer_chosen(rows),
        "validation/loss": float(pairwise_loss(chosen, rejected)),
        "validation/margin": float((chosen - rejected).mean()),
        "validation/pairs": float(len(pairs)),
    }
    return metrics, list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def samples(
    rows: Sequence[Comparison], scores: Sequence[tuple[float, float]], most: int = 8
) -> list[dict[str, object]]:
    """The pairs that the model gets most wrong, worst first."""
    worst = sorted(range(len(rows)), key=lambda i: scores[i][0] - scores[i][1])[:most]
    return [
        {
            "prompt": str(rows[i].prompt),
            "chosen": rows[i].chosen,
            "rejected": rows[i].rejected,
            "chosen_score": scores[i][0],
            "rejected_score": scores[i][1],
        }
        for i in worst
    ]
