"""TRL's SFTTrainer on several ranks; one rank takes it as it is (sft.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from rlhf_exp import distributed
from rlhf_exp.stages import divided

IGNORED = -100  # label of a token that does not count


class SFTSteps(SFTTrainer):
    """SFTTrainer whose batch is a step, of which each rank takes its rows, `size` at a time.

    The loss is a mean over the step's response tokens, as SFTTrainer's over its micro-batches together; entropy and
    accuracy are means over them too, where SFTTrainer takes the mean of the micro-batches' means.
    """

    size: int
    in_shards: bool

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        counted = inputs["labels"][:, 1:].ne(IGNORED).sum(dim=1).tolist()
        before, shares = self._total_train_tokens, []
        total = torch.zeros((), device=inputs["input_ids"].device)
        order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
        groups = distributed.shares(
            order, lambda hand: [hand[i : i + self.size] for i in range(0, len(hand), self.size)]
        )
        for rows, counts in distributed.turns(groups, self.in_shards):
            seen = self._total_train_tokens
            loss = self.compute_loss(
                model,
                part(inputs, rows, max(lengths[row] for row in rows)),
                num_items_in_batch=num_items_in_batch,
            )
            self.accelerator.backward(loss if counts else 0 * loss)
            if not counts:
                self._total_train_tokens = seen
            shares.append(counts * sum(counted[row] for row in rows) / max(1, sum(counted)))
            total += counts * loss.detach()
        divided.join_metrics(self, shares, before)
        return divided.finish(self, total)


def part(inputs: Mapping[str, Tensor], rows: Sequence[int], length: int) -> dict[str, Tensor]:
    """Some rows of a right-padded batch, without the columns that only others need."""
    return {name: x[list(rows), :length] for name, x in inputs.items()}
