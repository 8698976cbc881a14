"""Demonstrations mixed into PPO: the policy goes on modelling them (PPO-ptx, Ouyang et al. 2022, eq. 2).

Their data were pretraining text; here it is the demonstrations of the SFT stage, of which the answers' tokens count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms.logprob import linear_logprobs
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.scoring import answers, dealt, hidden_before
from rlhf_exp.schema import PPORun
from rlhf_exp.stages.actors import Actors
from rlhf_exp.stages.context import Context
from rlhf_exp.stages.order import batch_of
from rlhf_exp.stages.written import rows_of, written


@dataclass
class Demonstrations:
    """The encoded training demonstrations, in the form of a rollout."""

    rows: Rollout
    seed: int

    @classmethod
    def load(cls, config: PPORun, context: Context) -> Demonstrations | None:
        """None where `ppo.ptx_coef` is 0."""
        if config.ppo.ptx_coef == 0:
            return None
        _, tokens = context.read(config.dataset, "demonstrations", "train")
        return cls(written(tokens.prompts, tokens.answers["response"], context.base.eos_id), config.seed)

    def batch(self, number: int, size: int) -> list[int]:
        """The rows of the update `number` (from 1): consecutive pieces of one shuffle an epoch."""
        return batch_of(len(self.rows.prompts), size, self.seed + 1, number)


def losses(
    actors: Actors, demonstrations: Demonstrations, rows: list[int], micro: int, tokens_at_once: int = 0
) -> Iterator[Tensor]:
    """-log pi of the answers' tokens at temperature 1, a mean over the tokens of all `rows`: a share a micro-batch.

    Of this rank's micro-batches.

    The caller takes the backward of each before it asks for the next.
    """
    base, tokens = actors.base, sum(len(demonstrations.rows.responses[row]) for row in rows)
    weight, bias = base.output_layer
    for piece, counts in distributed.turns(
        dealt(demonstrations.rows, rows, micro, tokens_at_once), base.in_shards
    ):
        # of these rows alone: among all of them the mask would be as wide as the longest of the data
        batch = answers(rows_of(demonstrations.rows, piece), range(len(piece)), base)
        hidden = hidden_before(actors.roles, "policy", batch)
        found = linear_logprobs(hidden, weight, bias, batch.targets, layer=base.output(hidden.dtype))
        loss = -found.logprobs.sum() / tokens
        yield loss if counts else 0 * loss
