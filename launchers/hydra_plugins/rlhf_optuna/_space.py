"""The search space: Hydra's override grammar as optuna's distributions.

As in Hydra's own optuna plugin:

    choice(a, b)  a,b  shuffle(range(1, 4))   one of these
    range(1, 4)                               1, 2, 3 or 4: optuna includes the end
    range(0.5, 3, step=0.5)                   0.5, 1.0 ... 3.0
    interval(0, 1)                            a real number
    int(interval(1, 8))                       a whole number
    tag(log, interval(1e-3, 1))               drawn on a log scale

Under the grid sampler a range ends before its end, as in Hydra without optuna (and in that plugin). What differs: a
choice of one value is fixed; log on anything but an interval is refused where the plugin ignores it; a grid over
int(interval(1, 8)) has both ends.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString, Transformer
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from rlhf_exp import overrides
from rlhf_exp.errors import InputError

TYPES = ("int", "float", "categorical")


@dataclass
class Parameter:
    """A key that is searched over.

    word: the key as the override has it (++upstream.sft.optim.lr). grid: the values of a grid; None: it has no end.
    texts: how choices are written, by place.
    """

    word: str
    distribution: BaseDistribution
    grid: list[Any] | None = None
    texts: list[str] = field(default_factory=list)

    def override(self, value: Any) -> str:
        """`key=value`, for Hydra."""
        if isinstance(self.distribution, CategoricalDistribution):
            return f"{self.word}={self.texts[int(self.distribution.to_internal_repr(value))]}"
        return f"{self.word}={value!r}"


@dataclass
class Space:
    """searched: by key; fixed: overrides that every trial has, by key."""

    searched: dict[str, Parameter] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Of a trial: what is fixed, then what was chosen for it."""
        return [*self.fixed.values(), *(one.override(params[key]) for key, one in self.searched.items())]

    def grid(self) -> dict[str, list[Any]]:
        """The values of every key. Raises InputError where one has no end of them."""
        if endless := [one.word for one in self.searched.values() if one.grid is None]:
            raise InputError(
                [f"{word}: a grid needs values: write choice(...) or range(...)" for word in endless]
            )
        return {key: list(one.grid) for key, one in self.searched.items()}


def read(
    arguments: Iterable[str],
    params: Mapping[str, Any] | None = None,
    search_space: Mapping[str, Mapping[str, Any]] | None = None,
    loader: Any = None,
) -> Space:
    """The space of a sweep: `search_space`, then `params`, then the command line, of which the later ones win.

    loader: Hydra's, for glob(...). Raises InputError with every problem.
    """
    space, problems = Space(), []
    for key, given in (search_space or {}).items():
        try:
            space.searched[str(key)] = from_config(str(key), given)
        except InputError as error:
            problems += error.problems
    words = [f"{key}={'null' if value is None else value}" for key, value in (params or {}).items()]
    parsed, unreadable = overrides.parse([*words, *arguments], loader)
    for override in parsed:
        key = override.key_or_group
        space.searched.pop(key, None)
        space.fixed.pop(key, None)
        try:
            found = _parameter(override)
        except InputError as error:
            problems += error.problems
            continue
        if isinstance(found, Parameter):
            space.searched[key] = found
        else:
            space.fixed[key] = found
    if problems := [*unreadable, *problems]:
        raise InputError(problems)
    return space


def _parameter(override: Override) -> Parameter | str:
    """What an override searches over; the override for every trial if it does not."""
    word = override.get_key_element()
    if override.is_delete():
        return override.input_line
    if not override.is_sweep_override():
        return f"{word}={override.get_value_element_as_str()}"
    value = override.value()
    if "log" in getattr(value, "tags", ()) and not override.is_interval_sweep():
        raise InputError(f"{override.input_line}: log is for intervals: tag(log, interval(...))")
    if override.is_interval_sweep():
        return _numbers(override.input_line, word, value.start, value.end, log="log" in value.tags)
    if override.is_range_sweep() and not value.shuffle:
        found = _numbers(override.input_line, word, value.start, value.stop, step=value.step)
        found.grid = list(value.range())
        return found
    # not sweep_iterator: it shuffles, and a resumed study wants the choices that it knows
    elements = list(value.range()) if override.is_range_sweep() else _elements(override, value)
    return _choice(override.input_line, word, elements)


def _elements(override: Override, value: Any) -> list[Any]:
    listed = getattr(value, "list", None)
    return list(override.sweep_iterator()) if listed is None else list(listed)  # None: glob(...)


def _choice(line: str, word: str, elements: Iterable[Any]) -> Parameter | str:
    choices, texts = [], []
    for element in elements:
        text = _written(element)
        if text in texts:
            continue
        if isinstance(element, QuotedString):
            element = element.text
        known = element is None or isinstance(element, str | int | float | bool)
        choices.append(element if known else text)
        texts.append(text)
    if not texts:
        raise InputError(f"{line}: there is nothing to choose from")
    if len(texts) == 1:
        return f"{word}={texts[0]}"
    return Parameter(word, CategoricalDistribution(choices), choices, texts)


def _written(element: Any) -> str:
    """A value as Hydra reads it. choice('it\'s') has lost its quotes, which a text may need."""
    text = Transformer.str(element)
    if isinstance(element, str):
        parsed, problems = overrides.parse([f"key={text}"])
        if problems or parsed[0].is_sweep_override() or parsed[0].value() != element:
            return QuotedString(element, Quote.single).with_quotes()
    return text


def _numbers(line: str, word: str, low: Any, high: Any, step: Any = None, log: bool = False) -> Parameter:
    """Between two numbers, both included; whole ones if both (and the step) are whole."""
    whole = all(isinstance(number, int) for number in (low, high, 1 if step is None else step))
    try:
        if not all(map(math.isfinite, (low, high))):
            raise ValueError("its ends must be finite")
        if low > high:
            raise ValueError("it ends before it begins")
        if step is not None and step <= 0:
            raise ValueError("its step must be above 0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an end between two steps: the last step before it counts
            if whole:
                distribution = IntDistribution(low, high, log=log, step=step or 1)
            else:
                step = None if step is None else float(step)
                distribution = FloatDistribution(float(low), float(high), log=log, step=step)
    except ValueError as error:
        raise InputError(f"{line}: {str(error).rstrip('.')}") from None
    return Parameter(word, distribution, _steps(distribution))


def _steps(distribution: IntDistribution | FloatDistribution) -> list[Any] | None:
    """Every value between and with both ends; None: it has no step."""
    if distribution.step is None:
        return None
    count = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + place * distribution.step for place in range(count + 1)]


def from_config(key: str, given: Mapping[str, Any]) -> Parameter:
    """One entry of hydra.sweeper.search_space: {type, low, high, step, log, choices}."""
    where = f"hydra.sweeper.search_space.{key}"
    if not isinstance(given, Mapping) or given.get("type") not in TYPES:
        raise InputError(f"{where}: needs a type, one of {overrides.listed(TYPES, 'or')}")
    if unknown := sorted(set(given) - {"type", "low", "high", "step", "log", "choices"}):
        raise InputError(f"{where}: unknown {overrides.listed(unknown)}")
    if given["type"] == "categorical":
        choices = list(given.get("choices") or ())
        if not choices:
            raise InputError(f"{where}: needs choices")
        texts = [_written(value) for value in choices]
        return Parameter(key, CategoricalDistribution(choices), choices, texts)
    if given.get("low") is None or given.get("high") is None:
        raise InputError(f"{where}: needs low and high")
    kind = int if given["type"] == "int" else float
    step = None if given.get("step") is None else kind(given["step"])
    return _numbers(where, key, kind(given["low"]), kind(given["high"]), step, bool(given.get("log")))
