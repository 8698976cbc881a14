"""The reward model as transformers' Trainer sees it: a step is a batch of pairs, computed some at a time.

The Trainer hands over which pairs a step has; `training_step` puts them into rows (data/pairs.py) of at most
train.micro_batch_size pairs and reward.micro_batch_tokens tokens, and adds up their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from rlhf_exp import distributed
from rlhf_exp.algorithms.pairwise import (
    centering_loss,
    compared_tokens,
    pairwise_accuracy,
    pairwise_loss,
    token_wise_loss,
)
from rlhf_exp.data.pairs import Packed, Pair, pack
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.pairs import dealt, hidden_states
from rlhf_exp.schema import Reward
from rlhf_exp.stages import divided


class RewardModel(nn.Module):
    """Adapter and head as one module, as the Trainer wants it. share: each prompt is computed once."""

    def __init__(self, roles: Roles, head: ScalarHead, share: bool):
        super().__init__()
        self.base_model, self.head, self.share = roles.base.model, head, share
        self._roles, self.in_shards = roles, roles.base.in_shards

    def forward(self, packed: Packed, last: bool = False) -> Tensor:
        """Scores [2b, A] after every token of the answers, or [2b, 1] after their last; first the chosen answers."""
        if last:
            packed = packed._replace(answers=packed.answers[:, -1:])
        return self.head(hidden_states(self._roles, "reward", packed, self.share))


class Pairs:
    """A dataset of places in a list, and what makes a batch of them."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> int:
        return i

    @staticmethod
    def collate(rows: list[int]) -> dict[str, Tensor]:
        return {"rows": torch.tensor(rows)}


class PairTrainer(Trainer):
    """Trainer with the pairwise loss, a mean over all pairs of a step; logs their accuracy beside it.

    pairs and margins: of the whole training set, which the dataset's numbers point into. size and tokens: limits of
    what is computed together, 0 tokens is none.
    """

    def __init__(
        self,
        reward: Reward,
        pairs: Sequence[Pair],
        margins: Tensor | None,
        size: int,
        tokens: int,
        **arguments: Any,
    ):
        super().__init__(train_dataset=Pairs(len(pairs)), data_collator=Pairs.collate, **arguments)
        self.reward, self.pairs, self.margins = reward, pairs, margins
        self.size, self.tokens = size, tokens
        self.in_shards = False  # the base's weights
        self._right, self._seen = 0.0, 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean loss of a step's pairs; its gradient is added to the weights'."""
        model.train()
        rows = inputs["rows"].tolist()
        device, total = inputs["rows"].device, torch.zeros((), device=inputs["rows"].device)
        groups = dealt([self.pairs[row] for row in rows], self.tokens, self.size)
        for group, counts in distributed.turns(groups, self.in_shards):
            some = [rows[i] for i in group]
            packed = pack([self.pairs[row] for row in some]).to(device)
            margins = None if self.margins is None else self.margins[some].to(device)
            scores = model(packed, last=self.reward.loss == "last_token")
            loss = loss_of(self.reward, scores, packed, len(rows), margins)
            self.accelerator.backward(loss if counts else 0 * loss)
            if not counts:
                continue
            total += loss.detach()
            chosen, rejected = scores.detach()[:, -1].chunk(2)
            self._right += float(pairwise_accuracy(chosen, rejected)) * len(some)
            self._seen += len(some)
        return divided.finish(self, total)

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        if distributed.world_size() > 1:
            found = distributed.add({"right": self._right, "seen": self._seen})
            self._right, self._seen = found["right"], found["seen"]
        if self._seen:
            logs["accuracy"] = self._right / self._seen
            self._right, self._seen = 0.0, 0
        super().log(logs, *arguments, **keywords)


def loss_of(
    reward: Reward, scores: Tensor, packed: Packed, pairs: int, margins: Tensor | None = None
) -> Tensor:
    """The loss of b pairs, their share of the mean over `pairs`.

    scores [2b, A] after every token of the answers (token_wise), or any that end with those after the last tokens;
    margins [b] or None.
    """
    ends = scores[:, -1].chunk(2)
    if reward.loss == "token_wise":
        ids = packed.ids[0][packed.answers]
        mask = compared_tokens(*ids.chunk(2), *packed.lengths.chunk(2))
        loss = token_wise_loss(*scores.chunk(2), mask, pairs, reward.label_smoothing, margins)
    else:
        loss = pairwise_loss(*ends, margins, pairs, reward.label_smoothing)
    if reward.center_coef:
        loss = loss + reward.center_coef * centering_loss(*ends, denominator=pairs)
    return loss
