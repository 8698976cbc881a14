"""What orders the answers of stage=prefer: rules, a reward model, a local model as judge; each gives margins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from rlhf_exp.data.records import Prompt
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.rewards import functions
from rlhf_exp.rewards.judge import OWN_BASE, Judge, load
from rlhf_exp.rewards.ranking import Margins, by_scores, by_verdicts
from rlhf_exp.rewards.source import by_model
from rlhf_exp.schema import JUDGE, LABELLER, LEARNED, PreferRun
from rlhf_exp.stages.actors import load_reward_models
from rlhf_exp.stages.context import ROWS, Context


@dataclass
class Group:
    """A prompt and its different answers: texts without whitespace around them, and the ids that were sampled."""

    prompt: Prompt
    ids: list[int]
    texts: list[str]
    responses: list[list[int]]
    sources: list[str]  # the policy of each answer

    @property
    def asked(self) -> str:
        """The prompt as the data have it."""
        return str(self.prompt.prompt)


Labeller = Callable[[Sequence[Group]], list[Margins]]


def labellers(config: PreferRun, context: Context, roles: Roles) -> dict[str, Labeller]:
    """By name, in the order of prefer.labellers; reward model and judge are loaded."""
    return {name: _labeller(name, config, context, roles) for name in config.prefer.labellers}


def _labeller(name: str, config: PreferRun, context: Context, roles: Roles) -> Labeller:
    device = str(context.base.device)
    if name == LEARNED:
        heads = load_reward_models([LABELLER], context, roles)

        def learned(groups: Sequence[Group]) -> list[Margins]:
            prompts = [group.ids for group in groups for _ in group.responses]
            responses = [ids for group in groups for ids in group.responses]
            return of_scores(by_model(LABELLER, roles, heads, prompts, responses, ROWS), groups)

        return learned
    if name == JUDGE:
        own = config.judge.model == OWN_BASE
        judge = (
            Judge(context.base, config.judge, lambda: roles.use(BASE)) if own else load(config.judge, device)
        )
        return lambda groups: judged(judge, groups)

    def by_rule(groups: Sequence[Group]) -> list[Margins]:
        asked = [group.asked for group in groups for _ in group.texts]
        texts = [text for group in groups for text in group.texts]
        return of_scores(functions.score(name, asked, texts, device), groups)

    return by_rule


def of_scores(scores: Iterable[float], groups: Sequence[Group]) -> list[Margins]:
    """Margins of each group, from one score an answer, group by group."""
    each = iter(scores)
    return [by_scores([next(each) for _ in group.texts]) for group in groups]


def judged(judge: Judge, groups: Sequence[Group]) -> list[Margins]:
    """Margins by a judge that reads every pair of a group's answers, in both orders."""
    pairs = [(group, *pair) for group in groups for pair in combinations(group.texts, 2)]
    verdicts = judge.compare([g.asked for g, _, _ in pairs], [a for _, a, _ in pairs], [b for *_, b in pairs])
    chances, consistent = verdicts.p.tolist(), verdicts.consistent.tolist()
    found, start = [], 0
    for group in groups:
        count = len(group.texts)
        end = start + count * (count - 1) // 2
        found.append(by_verdicts(count, chances[start:end], consistent[start:end]))
        start = end
    return found
