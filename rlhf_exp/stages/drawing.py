"""How the policies of an evaluation answer: plain samples, or the best of n by the reward.

Answer j to a prompt has the same noise whichever policy gives it, so the first of n is the plain sample and the best
of 4 is chosen among the first 4 of 16. Answers are drawn in rounds of one a prompt, and a round that several policies
choose from (best_of_4 and best_of_16 of one adapter) is drawn once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rlhf_exp.rollout.engine import Rollout

Policy = tuple[Path | None, float]  # its adapter, and the beta of ilql


class Drawn(NamedTuple):
    """An answer to each row and its reward, and how many tokens were sampled for it, EOS included."""

    rollout: Rollout
    rewards: list[float]
    tokens: int


@dataclass
class Rounds:
    """The rounds of answers so far, by policy."""

    known: dict[Policy, list[Drawn]] = field(default_factory=dict)

    def of(self, policy: Policy, n: int, draw: Callable[[int], Drawn]) -> list[Drawn]:
        """The first n rounds of a policy; draw(j) makes the j-th, from 0."""
        rounds = self.known.setdefault(policy, [])
        for j in range(len(rounds), n):
            drawn = draw(j)
            # kept sets are for log-probs of the sampled distribution, which nobody asks for here
            rounds.append(drawn._replace(rollout=drawn.rollout._replace(supports=None)))
        return rounds[:n]


def best(rounds: Sequence[Drawn]) -> Drawn:
    """Of each row the answer of the highest reward, the first of equal ones (Stiennon et al. 2020); the cost of all.

    FloatingPointError where one of several rewards is nan: nothing would be the best.
    """
    if len(rounds) == 1:
        return rounds[0]
    rows = list(zip(*(each.rewards for each in rounds), strict=True))
    if any(reward != reward for row in rows for reward in row):
        raise FloatingPointError("the rewards of best-of-n hold nan")
    picks = [max(range(len(row)), key=lambda j: (row[j], -j)) for row in rows]
    columns = zip(*(each.rollout for each in rounds), strict=True)
    chosen = (
        None if column[0] is None else [column[j][i] for i, j in enumerate(picks)] for column in columns
    )
    rewards = [row[j] for row, j in zip(rows, picks, strict=True)]
    return Drawn(Rollout(*chosen), rewards, sum(each.tokens for each in rounds))
