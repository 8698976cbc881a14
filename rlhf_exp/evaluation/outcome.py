"""Reading an evaluation (eval.json): its metrics, the baseline, the best, how a figure is written.

    {"prompts": 64, "evaluate_on": "heldout",
     "policies": [{"name": "sft", "step": 0,
                   "metrics": {"reward": .., "reward_se": .., "gold": .., "gold_se": .., "kl": .., ..},
                   "gain": {"gold": {"mean": .., "low": .., "high": ..}, ..}}, ..],
     "samples": [{"prompt": "..",
                  "responses": {"sft": {"text": "..", "reward": .., "gold": .., "ended": true}, ..}}, ..],
     "data": {"name": "data", "kind": "references" or "demonstrations",
              "metrics": {"answers": 128, "prompts": 64, "reward": .., "reward_se": .., ..}}}

`prompts` is how many were answered, `evaluate_on` is as in `dataset`. The first policy called `sft`, else the first,
is the baseline. A policy whose step is null (an average) was never what trained; `run` (optional) tells apart the
runs of which policies are checkpoints, `role` is the parent that it is from, which does so where there is no `run`.
`bounds` (optional) names metrics that are upper bounds: the KL of best-of-n, where `best_of` is n; `beta` is that of
ilql's decoding. `judge` (optional) says by whom and against which policy win rates are: {"by": "the reward model",
"against": "sft"}. `<metric>_se` is a standard error; `gain` (optional) is the difference from the baseline with its
interval. `data` (optional) is the data's own answers: a row to compare with, no policy. Anything may be missing: a
metric that is not there shows as a dash, one that is not a number as `nan`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Policy = Mapping[str, Any]
MISSING = "–"
# dataset.evaluate_on -> what a figure is a mean of, before a noun
ANSWERED = {"heldout": "held-out", "validation": "validation", "train": "training-prompt"}
HELD_OUT = ANSWERED["heldout"]


class Metric(NamedTuple):
    key: str
    label: str
    short: str  # for the terminal
    unit: str
    spec: str  # of format()
    note: str
    best: bool = False  # whether the highest is the best; of the others neither more nor less is
    terminal: bool = True  # whether the terminal's table, which has 80 columns, shows it too


METRICS = (
    Metric(
        "gold", "Gold score", "gold", "", ".2f", "Mean score by a rule the policy was not trained on.", True
    ),
    Metric("reward", "Reward", "reward", "", ".2f", "Mean score by what the policy was trained on.", True),
    Metric(
        "win_rate",
        "Win rate",
        "wins",
        "",
        ".0%",
        "Share of answers that the judge prefers; a tie is half.",
        True,
    ),
    Metric(
        "greedy_gold",
        "Greedy gold score",
        "greedy",
        "gold",
        ".2f",
        "Gold score of the most probable answers.",
    ),
    Metric(
        "greedy_reward", "Greedy reward", "greedy", "reward", ".2f", "Reward of the most probable answers."
    ),
    *(
        Metric(
            f"{greedy}rouge{kind}",
            f"{greedy.replace('_', ' ').capitalize()}ROUGE-{kind}",
            f"R-{kind}",
            greedy.strip("_"),
            ".3f",
            f"F1 of {what} with the prompt's reference{', of the most probable answers' * bool(greedy)}.",
            terminal=False,
        )
        for greedy in ("", "greedy_")
        for kind, what in (("1", "words"), ("2", "word pairs"), ("L", "the longest common subsequence"))
    ),
    Metric(
        "relevance", "Relevance", "relev.", "", ".2f", "Cosine of answer and prompt by a sentence encoder."
    ),
    Metric(
        "reference_relevance",
        "Relevance to reference",
        "relev.",
        "ref.",
        ".2f",
        "Cosine of answer and reference by a sentence encoder.",
        terminal=False,
    ),
    Metric("kl", "KL", "KL", "nats", ".1f", "KL divergence from the first policy, summed over an answer."),
    Metric(
        "sampled_tokens",
        "Sampled",
        "sampled",
        "tokens",
        ".1f",
        "Tokens sampled for an answer, EOS included; of best-of-n those of all n.",
        terminal=False,
    ),
    Metric("length", "Length", "length", "tokens", ".1f", "Mean length of an answer, without EOS."),
    Metric(
        "distinct_2", "Distinct-2", "dist-2", "", ".2f", "Share of token pairs that differ; low is sameness."
    ),
    Metric(
        "repetition",
        "Repetition",
        "rep.",
        "",
        ".2f",
        "Share of runs of four tokens that came before in the answer.",
        terminal=False,
    ),
    Metric("empty_rate", "Empty", "empty", "", ".0%", "Answers without a visible character."),
    Metric("eos_rate", "Ended", "ended", "", ".0%", "Answers that ended by themselves before the limit."),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def number(row: Mapping[str, Any] | None, key: str) -> float | None:
    """The value as a float (it may be nan or infinite); None where it is missing, null or no number."""
    value = row.get(key) if row else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def finite(row: Mapping[str, Any] | None, key: str) -> float | None:
    """The value, None also where it is not finite."""
    value = number(row, key)
    return value if value is not None and math.isfinite(value) else None


def write(value: float | None, spec: str) -> str:
    """`value` by a format spec; a rounded zero has no sign."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    text = format(value, spec)
    return (
        text.replace("-", "", 1) if text.startswith("-") and not any(c in "123456789" for c in text) else text
    )


def shown(policy: Policy, metric: Metric) -> str:
    """A policy's figure; of an upper bound with a sign that says so."""
    text = write(number(policy["metrics"], metric.key), metric.spec)
    return f"≤{text}" if metric.key in (policy.get("bounds") or ()) and text != MISSING else text


def signed(text: str) -> str:
    """True minus signs, as wide as a plus, before figures."""
    return re.sub(r"(?<!\w)-(?=[\di])", "−", text)


def policies(evaluation: Mapping[str, Any]) -> list[Policy]:
    """Raises ValueError if there are none: then there is nothing to show."""
    found = list(evaluation.get("policies") or [])
    if not found:
        raise ValueError("the evaluation has no policies")
    return found


def rows(evaluation: Mapping[str, Any]) -> list[Policy]:
    """What tables show: the data's own answers where there are any, then the policies."""
    data = evaluation.get("data")
    return ([data] if data else []) + policies(evaluation)


def about_data(evaluation: Mapping[str, Any]) -> str:
    """What the row `data` is, in a sentence; empty where there is none."""
    data = evaluation.get("data")
    if not data:
        return ""
    answers, prompts = (int(data["metrics"][name]) for name in ("answers", "prompts"))
    what = data["kind"] if answers > 1 else data["kind"].removesuffix("s")
    return f"data: {answers} {what} of {prompts} prompt{'s' * (prompts > 1)}, scored as they are."


def baseline(found: Sequence[Policy]) -> Policy:
    return next((policy for policy in found if policy["name"] == "sft"), found[0])


def title(policy: Policy) -> str:
    """The name within a sentence."""
    return "SFT" if policy["name"] == "sft" else str(policy["name"])


def trained(found: Sequence[Policy]) -> list[Policy]:
    """The PPO checkpoints, in order of their step; averages have none."""
    return sorted((p for p in found if number(p, "step")), key=lambda p: p["step"])


def run_of(policy: Policy) -> str:
    """Which run a checkpoint is of; "" where the evaluation does not say."""
    return str(policy.get("run") or policy.get("role") or "")


def by_step(policy: Policy, found: Sequence[Policy]) -> bool:
    """Whether a step says which policy it is: of the stage's only run, and no other run has checkpoints here."""
    only = len({run_of(each) for each in trained(found)}) == 1
    return bool(number(policy, "step")) and only and not policy.get("run")


def stage(policy: Policy) -> str:
    """What a checkpoint's steps are of, in a sentence: PPO, RLOO."""
    return str(policy.get("role") or "ppo").upper()


def last(found: Sequence[Policy]) -> Policy:
    """The last PPO checkpoint; of several runs, or none, the last policy that is listed, if only the baseline."""
    checkpoints = trained(found)
    if len({run_of(policy) for policy in checkpoints}) == 1:
        return checkpoints[-1]
    others = [policy for policy in found if policy is not baseline(found)]
    return others[-1] if others else baseline(found)


def called(policy: Policy, found: Sequence[Policy]) -> str:
    """What a sentence about the policy at the end of these calls it."""
    return "the last checkpoint" if by_step(policy, found) else str(policy["name"])


def against(evaluation: Mapping[str, Any]) -> str:
    """The name of the policy that win rates are against."""
    judge = evaluation.get("judge") or {}
    return str(judge.get("against") or baseline(policies(evaluation))["name"])


def prompts(evaluation: Mapping[str, Any]) -> str:
    """Which prompts were answered, before a noun."""
    return ANSWERED[evaluation.get("evaluate_on", "heldout")]


def how_many(evaluation: Mapping[str, Any]) -> int | None:
    """Prompts that were answered; None where the evaluation does not say."""
    count = number(evaluation, "prompts")
    return None if count is None else int(count)


def measured(found: Sequence[Policy]) -> list[Metric]:
    """The metrics that at least one policy has."""
    return [m for m in METRICS if any(number(p["metrics"], m.key) is not None for p in found)]


def best(found: Sequence[Policy], metric: Metric) -> Policy | None:
    """The policy with the highest value, the earliest of equals; None if nobody or everybody is best."""
    values = [
        (value, policy) for policy in found if (value := finite(policy["metrics"], metric.key)) is not None
    ]
    if not metric.best or len({value for value, _ in values}) < 2:
        return None
    return max(values, key=lambda pair: pair[0])[1]


def spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` names: the first, the last, and evenly between."""
    if len(names) <= most:
        return list(names)
    if most == 1:
        return [names[-1]]
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def sampled(evaluation: Mapping[str, Any], most: int) -> list[str]:
    """The policies whose samples are shown: those that any sample has, in the evaluation's order."""
    there = {name for sample in evaluation.get("samples") or [] for name in sample["responses"]}
    ordered = [policy["name"] for policy in policies(evaluation) if policy["name"] in there]
    return spread(ordered, most)


def change(before: Policy, after: Policy, key: str) -> tuple[float, float | None, float | None] | None:
    """Difference of a metric and its 95 % interval: (mean, low, high), the last two None if unknown.

    A policy with `gain` (paired differences) has intervals for what is named there and for nothing else;
    without it they follow from the two standard errors as if independent, which is wider than need be.
    """
    gains = after.get("gain") or {}
    if (mean := finite(gains.get(key), "mean")) is not None:
        return mean, finite(gains[key], "low"), finite(gains[key], "high")
    old, new = finite(before["metrics"], key), finite(after["metrics"], key)
    if old is None or new is None or before is after:
        return None
    errors = [finite(policy["metrics"], f"{key}_se") for policy in (before, after)]
    if gains or None in errors:
        return new - old, None, None
    half = 1.96 * math.hypot(*errors)
    return new - old, new - old - half, new - old + half
