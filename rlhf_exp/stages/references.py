"""The scores of human references, which `ppo.score_scaling=reference` subtracts from the answers' scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_exp.data.encode import encode_responses
from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.rewards.source import score
from rlhf_exp.schema import PPORun

if TYPE_CHECKING:
    from rlhf_exp.stages.actors import Actors


def require(config: PPORun) -> None:
    """InputError where references are needed and a training prompt has none; before anything is trained."""
    if config.ppo.score_scaling != "reference":
        return
    prompts = load_view(config.dataset, "prompts", "train")
    lacking = sum(prompt.reference is None for prompt in prompts)
    if lacking:
        raise InputError(
            f"ppo.score_scaling=reference subtracts the score of a human reference, but {lacking} of {len(prompts)} "
            f"training prompts of dataset {config.dataset.name} have none: choose none or running"
        )


@dataclass
class References:
    """Scores by prompt id, each computed once, when its prompt first comes, by what also scores the answers."""

    config: PPORun
    known: dict[int, float] = field(default_factory=dict)

    def scores(
        self, actors: Actors, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]]
    ) -> list[float]:
        """One number a prompt, as answers are scored, with the same faults.

        The reference is encoded as the reward model's training answers were, EOS included.
        """
        import torch

        from rlhf_exp.stages import faults

        fresh: dict[int, float] = {}
        new = {p.id: (p, ids) for p, ids in zip(prompts, encoded, strict=True) if p.id not in self.known}
        if new:
            config, tokenizer = self.config, actors.base.tokenizer
            texts = [prompt.reference for prompt, _ in new.values()]
            responses = encode_responses(tokenizer, config.dataset, texts)
            found = score(
                config.reward_source,
                actors.roles,
                actors.reward_heads,
                [list(ids) for _, ids in new.values()],
                faults.scored_ids(config.ppo, tokenizer, responses),
                config.ppo.micro_batch_size,
                tokens=config.ppo.micro_batch_tokens,
            )
            # as the answers' own scores, or the difference would be of unlike things
            found = faults.scores(config.ppo, torch.tensor(found)).tolist()
            fresh = dict(zip(new, found, strict=True))
            # one that is no number is asked again when its prompt comes again
            self.known |= {id: value for id, value in fresh.items() if math.isfinite(value)}
        return [(self.known | fresh)[prompt.id] for prompt in prompts]
