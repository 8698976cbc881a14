"""Win rates of an evaluation: whose answer a judge prefers (eval.judge), of two to one prompt with one noise.

A reward model or a rule gives each answer a score, and the higher one wins. A local model reads both, in both orders
(rewards/judge.py), and a pair on which the orders disagree is a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.data.records import Prompt
from rlhf_exp.evaluation import wins
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.rewards import functions, judge
from rlhf_exp.rewards.source import by_gold, by_model, join
from rlhf_exp.schema import LEARNED, EvalRun, proxies

if TYPE_CHECKING:
    from rlhf_exp.rollout.engine import Rollout
    from rlhf_exp.stages.actors import Heads
    from rlhf_exp.stages.evaluate import Measured

GOLDEN, MODEL = functions.JUDGES
OWN = "judge"  # the scores of a judge that is neither reward nor gold


def score_of(config: EvalRun) -> str | None:
    """Under which name an answer's score by the judge is kept; None: it gives none, or there is no judge."""
    spec = config.eval.judge
    if spec in (functions.NONE, MODEL):
        return None
    if spec == LEARNED and config.reward_source.kind == LEARNED:
        return "reward"
    return "gold" if spec in (GOLDEN, config.eval.gold) else OWN


def own_scores(
    config: EvalRun,
    roles: Roles,
    heads: Heads,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    shown: list[list[int]],
    size: int,
) -> dict[str, list[float]]:
    """The judge's scores where they are not those of reward or gold; else nothing."""
    if score_of(config) != OWN:
        return {}
    if config.eval.judge == LEARNED:  # of a sum with rules, what is learned alone
        members = [
            by_model(r, roles, heads, rollout.prompts, shown, size) for r in proxies(config.reward_source)
        ]
        return {OWN: join(members, config.reward_source.ensemble_lambda)[0]}
    asked = [str(prompt.prompt) for prompt in prompts]
    return {OWN: by_gold(config.eval.judge, roles, heads, rollout.prompts, shown, asked, size)}


class Comparer:
    """The judge of an evaluation, loaded if it is a model."""

    def __init__(self, config: EvalRun, roles: Roles):
        self.config, self.score = config, score_of(config)
        self.judge: judge.Judge | None = None
        if config.eval.judge == MODEL and config.judge.model == judge.OWN_BASE:
            self.judge = judge.Judge(roles.base, config.judge, lambda: roles.use(BASE))
        elif config.eval.judge == MODEL:
            self.judge = judge.load(config.judge, str(roles.base.device))

    def metrics(self, ours: Measured, theirs: Measured, prompts: Sequence[Prompt]) -> dict[str, float]:
        """The win rate of one policy against another; nothing without a judge.

        prompts: one for each answer.
        """
        if self.judge is not None:
            asked = [str(prompt.prompt) for prompt in prompts]
            verdicts = self.judge.compare(asked, ours.texts, theirs.texts)
            outcomes = verdicts.wins.tolist()
            more = {"judge_consistent": float(verdicts.consistent.float().mean())}
        elif self.score is not None:
            outcomes, more = wins.by_score(ours.scores[self.score], theirs.scores[self.score]), {}
        else:
            return {}
        found = wins.win_rate(outcomes, self.config.eval.samples_per_prompt, seed=self.config.seed)
        named = {"se": found.se, "low": found.low, "high": found.high, "ties": found.ties}
        return {"win_rate": found.mean} | {f"win_rate_{key}": value for key, value in named.items()} | more


def said(config: EvalRun) -> str:
    """The judge, for people."""
    spec = config.eval.judge
    if spec == LEARNED:
        return "the reward model"
    if spec == GOLDEN:
        return f"the gold score ({config.eval.gold})"
    if spec != MODEL:
        return f"the rule {spec}"
    name = config.model.name if config.judge.model == judge.OWN_BASE else Path(config.judge.model).name
    return f"the model {name}, which reads each pair in both orders"
