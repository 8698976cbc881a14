"""What an evaluation says, in words: the first sentence of the report, and what to be warned of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_exp.evaluation import outcome
from rlhf_exp.evaluation.interval import LEAST

SHORTER, SAMER = 0.5, 0.6  # below these shares of the baseline's length and distinct-2 the report warns


def verdict(found: Sequence[outcome.Policy], prompts: int | None = None) -> str:
    """From the baseline to the last policy: the gold score (else reward), KL, length, empty answers.

    prompts: how many were answered, where that is known.
    """
    before, after = outcome.baseline(found), outcome.last(found)
    if before is after:
        return f"Only {before['name']} was evaluated, so there is nothing to compare it with."
    steps = outcome.by_step(after, found)
    start = f"After {after['step']:g} {outcome.stage(after)} steps" if steps else f"With {after['name']}"
    sentences = [_score(start, before, after, prompts) + _distance(before, after) + "."]
    lengths = [outcome.finite(policy["metrics"], "length") for policy in (before, after)]
    if None not in lengths:
        sentences.append("Answers went from {:.1f} to {:.1f} tokens".format(*lengths) + _empty(after) + ".")
    return " ".join(sentences)


def _score(start: str, before: outcome.Policy, after: outcome.Policy, prompts: int | None) -> str:
    for key in ("gold", "reward"):
        values = [outcome.finite(policy["metrics"], key) for policy in (before, after)]
        difference = outcome.change(before, after, key)
        if None in values or difference is None:
            continue
        mean, low, high = difference
        name = outcome.BY_KEY[key].label.lower()
        ends = "from {:.2f} to {:.2f}".format(*values)
        if low is None or high is None:
            few = f"; {too_few(prompts)}" if prompts is not None and prompts < LEAST else ""
            return f"{start} the {name} went {ends} ({mean:+.2f}{few})"
        verb = "rose" if low > 0 else "fell" if high < 0 else "changed no more than by chance,"
        sure = f"95 % interval {low:+.2f} to {high:+.2f}" + (f" over {prompts} prompts" if prompts else "")
        return f"{start} the {name} {verb} {ends} ({mean:+.2f}, {sure})"
    return f"{start} no score could be compared"


def too_few(prompts: int) -> str:
    return f"{prompts} prompt{'s are' if prompts != 1 else ' is'} too few for an interval"


def _distance(before: outcome.Policy, after: outcome.Policy) -> str:
    kl = outcome.finite(after["metrics"], "kl")
    most = "at most " if "kl" in (after.get("bounds") or ()) else ""
    return f", at a KL of {most}{kl:.1f} nats from {outcome.title(before)}" if kl is not None else ""


def _empty(after: outcome.Policy) -> str:
    rate = outcome.finite(after["metrics"], "empty_rate")
    if rate is None:
        return ""
    return f"; {rate:.0%} are empty" if rate else "; none is empty"


def warnings(found: Sequence[outcome.Policy], curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each sign of trouble in the last checkpoint."""
    before, after = outcome.baseline(found), outcome.last(found)
    lines = []
    for policy in found:
        lost = [
            m.label
            for m in outcome.METRICS
            if not math.isfinite(outcome.number(policy["metrics"], m.key) or 0)
        ]
        if lost:
            lines.append(f"{policy['name']}: not a finite number: {', '.join(lost)}.")
    broken = [
        row["step"]
        for row in curves
        if any(isinstance(v, float) and not math.isfinite(v) for v in row.values())
    ]
    if broken:
        lines.append(
            f"{len(broken)} PPO steps logged values that are not finite, the first at step {broken[0]}."
        )
    if before is not after:
        lines += _against(before, after, outcome.called(after, found))
    best = outcome.best(found, outcome.BY_KEY["gold"])
    if best is not None and _clearly_better(best, after):
        value = outcome.write(outcome.finite(best["metrics"], "gold"), ".2f")
        lines.append(
            f"The best gold score, {value}, is that of {best['name']}, not of {outcome.called(after, found)}."
        )
    return lines


def _clearly_better(best: outcome.Policy, after: outcome.Policy) -> bool:
    """By more than a standard error, where there is one."""
    values = [outcome.finite(policy["metrics"], "gold") for policy in (after, best)]
    errors = [outcome.finite(policy["metrics"], "gold_se") or 0 for policy in (after, best)]
    return best is not after and (values[0] is None or values[1] - values[0] > max(errors))


def _against(before: outcome.Policy, after: outcome.Policy, called: str) -> list[str]:
    """Signs that the policy, so called, got worse than the baseline in something the reward does not see."""

    def pair(key: str) -> tuple[float, float]:
        values = [outcome.finite(policy["metrics"], key) for policy in (before, after)]
        return tuple(math.nan if value is None else value for value in values)

    lines = []
    reward, gold = outcome.change(before, after, "reward"), outcome.change(before, after, "gold")
    if reward and gold and (reward[1] or reward[0]) > 0 > (gold[0] if gold[2] is None else gold[2]):
        lines.append(
            "The reward rose while the gold score fell: the policy exploits the reward (Gao et al. 2023, "
            "overoptimisation). An earlier checkpoint or a higher ppo.kl_coef is better."
        )
    if pair("empty_rate")[1] > 0:
        lines.append(f"{pair('empty_rate')[1]:.1%} of {called}'s answers are empty.")
    old, new = pair("length")
    if new < SHORTER * old:
        lines.append(f"Answers shrank to {new / old:.0%} of {outcome.title(before)}'s length.")
    old, new = pair("distinct_2")
    if new < SAMER * old:
        lines.append(
            f"Distinct-2 fell to {new / old:.0%} of {outcome.title(before)}'s: the answers grow alike."
        )
    if pair("eos_rate")[1] < 0.5:
        lines.append(f"Most answers of {called} were cut off at the limit (generation.max_new_tokens).")
    return lines
