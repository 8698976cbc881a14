"""The first half of rft: the policy answers each prompt n times, the answers are scored, the best are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_exp.data import labels
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.functions import NONE
from rlhf_exp.rewards.ranking import best
from rlhf_exp.rewards.source import by_gold, score
from rlhf_exp.rollout.engine import Rollout, judged
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import RFTRun
from rlhf_exp.stages.actors import Heads
from rlhf_exp.stages.context import ROWS, Context
from rlhf_exp.stages.evaluate import repeat, write
from rlhf_exp.stages.prefer import EMPTY, EQUAL, UNFINISHED, Asked

KNOWN = "answers of an earlier round"


@dataclass
class Tally:
    """A round's counts and sums; plain, so that a checkpoint can hold it."""

    round: int
    answers: int = 0
    unfinished: int = 0
    tokens: int = 0  # sampled, EOS included: what the round cost
    dropped: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    sums: dict[str, float] = field(
        default_factory=dict
    )  # of score and gold, over all answers and the kept ones

    def add(self, name: str, values: Sequence[float]) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + math.fsum(values)

    def metrics(self) -> dict[str, float]:
        """`rft/score` is the mean of all answers, `rft/kept_score` of those that are learned; gold likewise."""
        found = {"answers": self.answers, "kept": self.kept, "tokens": self.tokens, "round": self.round}
        means = {name: self.answers for name in ("score", "gold")}
        means |= {f"kept_{name}": self.kept for name in ("score", "gold")}
        found |= {name: self.sums[name] / n for name, n in means.items() if n and name in self.sums}
        if self.answers:
            found["unfinished"] = self.unfinished / self.answers
        return {f"rft/{name}": float(value) for name, value in found.items()}


def of_round(config: RFTRun, asked: Sequence[Asked], number: int) -> list[list[Asked]]:
    """The prompts of a round, in parts that are answered together; which, the seed and the round draw."""
    most = config.rft.prompts
    drawn = sorted(range(len(asked)), key=lambda i: row_key(config.seed, number, asked[i][0].id))
    chosen = [asked[i] for i in sorted(drawn[: most or None])]
    size = max(1, ROWS // config.rft.samples)
    return [chosen[start : start + size] for start in range(0, len(chosen), size)]


def select(
    config: RFTRun,
    context: Context,
    roles: Roles,
    heads: Heads,
    part: Sequence[Asked],
    tally: Tally,
    known: set[tuple[int, str]],
) -> list[dict[str, Any]]:
    """The answers to learn of a part's prompts, as plain rows; the others are counted.

    A row: {"id" and "fields": of the prompt, "asked": its token ids, "ids": those of the answer as it was scored,
    "text", "score", "ended", "round"}, and "gold" where there is a gold scorer. known: (prompt, text) of the answers
    that are learned already; what is new is added.
    """
    count, rollout, texts, scores = sampled(config, context, roles, heads, part, tally.round)
    tally.answers += len(texts)
    tally.unfinished += len(texts) - sum(rollout.ended)
    tally.tokens += sum(map(len, rollout.responses))
    shown, dropped, rows = judged(rollout), Counter(tally.dropped), []
    for place, (prompt, ids) in enumerate(part):
        first, last = place * count, (place + 1) * count
        sound = usable(texts[first:last], rollout.ended[first:last], config.rft.unfinished, dropped)
        picks = best(scores["score"][first:last], sound, config.rft.keep, config.rft.threshold, dropped)
        for i in (first + pick for pick in picks):
            if (prompt.id, texts[i]) in known:
                dropped[KNOWN] += 1
                continue
            known.add((prompt.id, texts[i]))
            row = {"id": prompt.id, "fields": labels.fields_of(prompt.prompt), "asked": ids, "ids": shown[i]}
            row |= {"text": texts[i], "ended": rollout.ended[i], "round": tally.round}
            rows.append(row | {name: values[i] for name, values in scores.items()})
    tally.dropped = dict(dropped)
    tally.kept += len(rows)
    for name, values in scores.items():
        tally.add(name, values)
        tally.add(f"kept_{name}", [row[name] for row in rows])
    return rows


def sampled(
    config: RFTRun, context: Context, roles: Roles, heads: Heads, part: Sequence[Asked], number: int
) -> tuple[int, Rollout, list[str], dict[str, list[float]]]:
    """n, and n answers to each prompt of a part one after the other: sampled, as texts, with score and gold."""
    count, source = config.rft.samples, config.reward_source
    keys = [row_key(config.seed, number, prompt.id, sample) for prompt, _ in part for sample in range(count)]
    encoded = repeat([ids for _, ids in part], count)
    rollout = write(roles, "policy", encoded, keys, config.generation)
    shown = judged(rollout)
    texts = [text.strip() for text in context.base.tokenizer.batch_decode(shown, skip_special_tokens=True)]
    scores = {"score": score(source, roles, heads, rollout.prompts, shown, ROWS)}
    if source.gold != NONE:
        said = [str(prompt.prompt) for prompt, _ in part for _ in range(count)]
        scores["gold"] = by_gold(source.gold, roles, heads, rollout.prompts, shown, said, ROWS)
    return count, rollout, texts, scores


def usable(texts: Sequence[str], ended: Sequence[bool], unfinished: str, dropped: Counter[str]) -> list[int]:
    """Places of a prompt's different answers; an empty one is none, one that was cut off only where it may be."""
    found: dict[str, int] = {}
    for i, (text, whole) in enumerate(zip(texts, ended, strict=True)):
        reason = None
        if not text:
            reason = EMPTY
        elif not whole and unfinished == "drop":
            reason = UNFINISHED
        elif text in found:
            reason = EQUAL
        if reason:
            dropped[reason] += 1
        else:
            found[text] = i
    return list(found.values())
