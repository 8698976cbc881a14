"""The repetition penalty (Keskar et al. 2019, arXiv:1909.05858, section 4.1) on logits of which one chunk is held.

A token that came before, in the prompt or in the answer, has its logit divided by the penalty where that is
positive and multiplied by it where it is negative, once however often it came (transformers'
RepetitionPenaltyLogitsProcessor). What came before is told by lengths, so padding is never penalised, whatever
its id.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.shapes import check_shapes


class Repetition(NamedTuple):
    """The penalty of N positions: which tokens came before each.

    Position n penalises the tokens ids[row[n], :length[n]]. Nothing larger than [chunk, L] is made of it.
    """

    penalty: float
    ids: Tensor  # int64[b, L], right-padded
    row: Tensor  # int64[N]
    length: Tensor  # int64[N], at least 1

    def seen(self, rows: slice) -> Tensor:
        """int64[chunk, L] for the positions `rows`: tokens that came before; padding repeats the first."""
        before = self.ids[self.row[rows]]
        counts = torch.arange(before.shape[1], device=before.device) < self.length[rows].unsqueeze(1)
        return before.where(counts, before[:, :1])

    def check(self, positions: int, vocab_size: int) -> None:
        """Raise ValueError unless there are `positions` positions, with ids of the vocabulary before each."""
        check_shapes(ids=(self.ids, "b L"), row=(self.row, "N"), length=(self.length, "N"))
        if len(self.row) != positions:
            raise ValueError(f"the repetition penalty has {len(self.row)} positions, not {positions}")
        if not self.penalty > 0:
            raise ValueError(f"repetition penalty must be positive, got {self.penalty}")
        if positions:
            ends = torch.stack(
                [*self.length.aminmax(), *self.ids.aminmax()]
            ).tolist()  # one wait for the device
            if not 1 <= ends[0] <= ends[1] <= self.ids.shape[1]:
                raise ValueError(f"lengths before a position must be from 1 to {self.ids.shape[1]}")
            if not 0 <= ends[2] <= ends[3] < vocab_size:
                raise ValueError(f"a token before a position is outside the vocabulary of {vocab_size}")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalise in place the logits [N, V] of the tokens `seen` int64[N, L]; a token may be named twice.

    Returns d logits' / d logits [N, L] at these tokens: `penalty` or 1 / `penalty`.
    """
    values = logits.gather(1, seen)
    negative = values < 0
    factors = torch.full_like(values, 1 / penalty).masked_fill_(negative, penalty)
    # a true division, as in transformers: values * (1 / penalty) can differ in the last bit
    logits.scatter_(1, seen, torch.where(negative, values * penalty, values / penalty))
    return factors


def penalise_gradient(gradient: Tensor, seen: Tensor, factors: Tensor) -> None:
    """From d / d logits' to d / d logits, in place on [N, V]: times the factors [N, L] at the tokens `seen`."""
    # a token that is named twice has the same product in both places
    gradient.scatter_(1, seen, gradient.gather(1, seen).mul_(factors))
