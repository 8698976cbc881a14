"""What scores a response: the reward stage's adapter and head, or a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_exp.rewards import functions
from rlhf_exp.schema import RewardSource

if TYPE_CHECKING:
    from rlhf_exp.model.heads import ScalarHead
    from rlhf_exp.model.roles import Roles


def score(
    source: RewardSource,
    roles: Roles,
    head: ScalarHead | None,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    size: int,
) -> list[float]:
    """One number a response, from the sampled ids as they are (learned) or from their text (function).

    The reward model sees the very ids that were sampled, EOS included, as in its training; `size` rows a forward.
    """
    if source.kind == "learned":
        from rlhf_exp.rewards.learned import score_sequences

        sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        return score_sequences(roles, "reward", head, sequences, size)
    decode = roles.base.tokenizer.batch_decode
    texts = (decode([list(ids) for ids in rows], skip_special_tokens=True) for rows in (prompts, responses))
    return functions.score(source.function, *texts, device=str(roles.base.device))
