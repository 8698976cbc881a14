"""What a reward source adds up: `reward_source.parts=[1*learned,-0.01*length]`, each part WEIGHT*SPEC.

A source of one kind is a sum of one part, so that whoever scores, checks or names it looks at parts only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rlhf_exp.errors import InputError
from rlhf_exp.schema import LEARNED, RewardSource


class Part(NamedTuple):
    """A weight and what it weighs: `learned`, or a rule as in reward_source.function; key: who says so."""

    weight: float
    spec: str
    key: str


def parts_of(source: RewardSource) -> list[Part]:
    """The parts of a reward source. Raises InputError with a line for each that cannot be read."""
    found, problems = readable(source)
    if problems:
        raise InputError(problems)
    return found


def readable(source: RewardSource) -> tuple[list[Part], list[str]]:
    """The parts that can be read, and a line for each that cannot."""
    if source.kind == "learned":
        return [Part(1.0, LEARNED, "reward_source.kind")], []
    if source.kind == "function":
        return [Part(1.0, source.function, "reward_source.function")], []
    found, problems = [], []
    for place, text in enumerate(source.parts):
        key = f"reward_source.parts[{place}]"
        try:
            found.append(Part(*parse(text), key))
        except InputError as error:
            problems += [f"{key}={text}: {problem}" for problem in error.problems]
    return found, problems


def parse(text: str) -> tuple[float, str]:
    """WEIGHT*SPEC -> its two sides; a spec may hold more stars (regex). Raises InputError."""
    weight, star, spec = (side.strip() for side in text.partition("*"))
    if not star or not spec:
        raise InputError(f"expected WEIGHT*SPEC, such as 0.5*{weight or 'length'}")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{weight!r} is no weight: expected a number before the first *, such as -0.01*{spec}"
        )
    return number, spec


def said(source: RewardSource, learned: str = "learned reward model") -> str:
    """A reward source for people; `learned`: the name of what is learned there."""
    if source.ensemble > 1:
        learned = f"mean - {source.ensemble_lambda:g} * std of {learned}"
    if source.kind != "sum":
        return learned if source.kind == "learned" else source.function
    names = (
        (part.weight, f"({learned})" if part.spec == LEARNED else part.spec) for part in parts_of(source)
    )
    terms = [f"{'-' if weight < 0 else '+'} {abs(weight):g} * {name}" for weight, name in names]
    return " ".join(terms).removeprefix("+ ")
