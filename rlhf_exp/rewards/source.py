"""What scores a response: reward models (adapters and heads on the one base), rules, and sums of them.

An ensemble of k reward models is k adapters: k forwards of one base, not k models. Its members' scores are joined to
mean - lambda * std: where they disagree, the data did not decide, and a policy would go astray (Coste et al. 2023,
"uncertainty-weighted optimization"). They subtract the variance; the standard deviation is in the unit of the score,
so that lambda means the same whatever the reward models' scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_exp import distributed
from rlhf_exp.rewards import functions
from rlhf_exp.rewards.parts import parts_of
from rlhf_exp.schema import GOLD, LEARNED, RewardSource, proxies

if TYPE_CHECKING:
    from rlhf_exp.model.heads import ScalarHead
    from rlhf_exp.model.roles import Roles

Ids = Sequence[Sequence[int]]


def score(
    source: RewardSource,
    roles: Roles,
    heads: Mapping[str, ScalarHead],
    prompts: Ids,
    responses: Ids,
    size: int,
    figures: dict[str, float] | None = None,
    tokens: int = 0,
) -> list[float]:
    """One number a response, from the sampled ids as they are (learned) or from their text (rules).

    A reward model sees the very ids that were sampled, EOS included, as in its training; `size` rows a forward, and
    `tokens` of them with their padding (0: no limit).
    heads: of the reward models, by role. figures: where the means of a sum's parts and of the members' disagreement
    are noted.
    """
    parts = parts_of(source)
    totals = [0.0] * len(responses)
    for place, part in enumerate(parts, 1):
        if part.spec == LEARNED:
            members = [
                by_model(role, roles, heads, prompts, responses, size, tokens) for role in proxies(source)
            ]
            values, spread = join(members, source.ensemble_lambda)
            if figures is not None and len(members) > 1:
                figures["objective/ensemble_std"] = mean(spread)
        else:
            values = by_rule(part.spec, roles, prompts, responses)
        if figures is not None and len(parts) > 1:
            figures[f"objective/part_{place}"] = mean(values)  # before its weight
        totals = [total + part.weight * value for total, value in zip(totals, values, strict=True)]
    return totals


def join(members: Sequence[Sequence[float]], lam: float) -> tuple[list[float], list[float]]:
    """mean - lam * std over the members, for each answer; and that std.

    members: [k][answers]. The standard deviation is that of a population (1/k, as Coste et al. 2023): the members are
    the whole ensemble and no sample of a larger one, and a single member disagrees with nobody: 0, not 0/0.
    """
    joined, spread = [], []
    for values in zip(*members, strict=True):
        middle = mean(values)
        spread.append(math.sqrt(mean([(value - middle) ** 2 for value in values])))
        joined.append(middle - lam * spread[-1])
    return joined, spread


def mean(values: Sequence[float]) -> float:
    """Plain, so that what is not finite comes through and is seen."""
    return sum(values) / len(values)


def by_gold(
    spec: str,
    roles: Roles,
    heads: Mapping[str, ScalarHead],
    prompts: Ids,
    responses: Ids,
    asked: Sequence[str],
    size: int,
    tokens: int = 0,
) -> list[float]:
    """Scores of a gold scorer, learned or a rule; asked: the prompts as the data have them, which rules look at."""
    if spec == LEARNED:
        return by_model(GOLD, roles, heads, prompts, responses, size, tokens)
    texts = roles.base.tokenizer.batch_decode([list(ids) for ids in responses], skip_special_tokens=True)
    return distributed.from_main(lambda: functions.score(spec, asked, texts, device=str(roles.base.device)))


def by_model(
    role: str,
    roles: Roles,
    heads: Mapping[str, ScalarHead],
    prompts: Ids,
    responses: Ids,
    size: int,
    tokens: int = 0,
) -> list[float]:
    """The scores of the reward model that has this role."""
    from rlhf_exp.rewards.learned import score_sequences

    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    return score_sequences(roles, role, heads[role], sequences, size, tokens=tokens)


def by_rule(spec: str, roles: Roles, prompts: Ids, responses: Ids) -> list[float]:
    """The scores of a rule, from the texts that the ids stand for."""
    decode = roles.base.tokenizer.batch_decode
    texts = [decode([list(ids) for ids in rows], skip_special_tokens=True) for rows in (prompts, responses)]
    # a rule may look at all answers at once, or draw: one rank asks it
    return distributed.from_main(lambda: functions.score(spec, *texts, device=str(roles.base.device)))
