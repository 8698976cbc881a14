"""What is wrong with the words on the command line, all of it at once and in our own words.

Hydra stops at its first problem, explains it over several lines, and advises `+key=value`, which steps around
the schema. So every override is looked at here before Hydra composes: can it be read, does the stage have the
group or key, the group the option, has the value the right type and range.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp import conftree, schema
from rlhf_exp.fields import did_you_mean, type_text, value_problem, walk

KEY = re.compile(r"[~+]{0,2}[\w./@-]+")


def parse(lines: Sequence[str], loader: Any = None) -> tuple[list[Override], list[str]]:
    """Hydra's reading of each `key=value`, and a line for each that it cannot read."""
    parser = OverridesParser.create(config_loader=loader)
    parsed, problems = [], []
    for line in lines:
        try:
            override = parser.parse_overrides([line])[0]
        except HydraException as error:
            problems.append(_unreadable(line, error))
            continue
        if not override.key_or_group:
            problems.append(f"cannot read {line!r}: write key=value")
        elif override.package is not None:
            problems.append(f"cannot read {line!r}: leave out @{override.package}")
        else:
            parsed.append(override)
    return parsed, problems


def _unreadable(line: str, error: HydraException) -> str:
    key, equals, value = line.partition("=")
    if line in schema.STAGES:
        return f"cannot read {line!r}: write stage={line}"
    if not equals:
        return f"cannot read {line!r}: write key=value"
    if not KEY.fullmatch(key):
        return f"cannot read {line!r}: {key!r} is not a key"
    if "while evaluating" in str(error):
        return f"cannot read {line!r}: {str(error).splitlines()[1]}"
    if any(value.count(left) != value.count(right) for left, right in ("[]", "{}", "()")):
        return f"cannot read {line!r}: a bracket is not closed; in a text, put it in quotes: '{key}=\"...\"'"
    if value.rstrip().endswith(","):
        return f"cannot read {line!r}: nothing stands behind the last comma"
    # letters beyond ASCII, quotes, #, = and the like: Hydra wants the text quoted, and the shell the whole
    return f"cannot read {line!r}: put the text in quotes: '{key}=\"...\"'"


def text(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if value == "" else str(value)


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def variants(override: Override) -> list[str]:
    """The override once for each value it sweeps over (an interval: its ends); else itself."""
    if not override.is_sweep_override():
        return [override.input_line]
    if override.is_interval_sweep():
        values = [str(override.value().start), str(override.value().end)]
    else:
        values = list(override.sweep_string_iterator())
    return [f"{override.get_key_element()}={value}" for value in values]


@dataclass
class Settings:
    """`upstream.<stage>` taken apart: options of groups, values of dotted keys, what is wrong with them."""

    options: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Checker:
    """Knows the groups and keys of one stage; of all stages where none is chosen (or an unknown one)."""

    def __init__(self, tree: conftree.Tree, stage: str | None):
        self.tree = tree
        self.stage = stage
        self.runs = {name: schema.RUNS[name]() for name in ([stage] if stage else schema.STAGES)}
        self.known: dict[str, tuple[Any, bool, str]] = {}  # key: (field, is a section, a stage that has it)
        for name, run in self.runs.items():
            for key, f, value in walk(run):
                self.known.setdefault(key, (f, is_dataclass(value), name))

    def override(self, override: Override) -> Iterator[str]:
        """The problems of one word of the command line (one value of it, if it sweeps)."""
        key, line, value = override.key_or_group, override.input_line, override.value()
        if override.is_hydra_override():
            yield from _hydras(key, value)
            return
        if override.is_sweep_override():
            yield f"{line} has several values where one is needed"
        elif override.is_delete():
            yield f"{line}: nothing can be removed, only set to something else"
        elif key in self.tree and not isinstance(value, Mapping):
            if line.startswith("+"):
                yield f"{line}: leave out the +, the group is there already"
            else:
                yield from self.option(key, value)
        elif override.is_add() and key in self.known and not key.startswith("upstream"):
            yield f"{line}: leave out the +, the key is there already"
        else:
            yield from self.entry(key, value)

    def option(self, group: str, value: Any) -> Iterator[str]:
        """The problems of choosing an option of a group."""
        if self.stage and not conftree.has_group(self.stage, group):
            yield f"stage {self.stage} has no group {group}{_owners(group.replace('/', '.'), 'group')}"
        elif value not in self.tree[group]:
            names = schema.STAGES if group == "stage" else list(self.tree[group])
            hint = did_you_mean(str(value), names) or ";"
            options = f"there {'is' if len(names) == 1 else 'are'} {listed(names)}"
            yield f"unknown {group} {text(value)}{hint} {options}"

    def entry(self, key: str, value: Any) -> Iterator[str]:
        """The problems of setting a key, a section by a dict, or something upstream."""
        parts = key.split(".", 2)
        if parts[0] == "upstream" and ".".join(parts[:2]) in self.known and len(parts) > 1:
            nested = {parts[2]: value} if len(parts) > 2 else value
            if isinstance(nested, Mapping):
                found = settings(schema.stage_of(parts[1]), nested, self.tree)
                yield from (f"upstream.{parts[1]}: {p}" for p in found.problems)
                return
        if key.startswith(f"{DEEPSPEED}.") and DEEPSPEED in self.known:
            return  # strategies/require.py knows what may be there
        if key not in self.known:
            yield self.unknown(key)
            return
        f, is_section, stage = self.known[key]
        if not is_section:
            yield from self._value(key, f, stage, value)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                yield from self.entry(f"{key}.{name}", item)
        else:
            inside = next(k for k in self.known if k.startswith(f"{key}."))
            group = key.replace(".", "/")
            instead = f"{group}={text(value)}" if group in self.tree else f"one of its keys, such as {inside}"
            yield f"{key} is a section: set {instead}"

    def unknown(self, key: str) -> str:
        """That no key or group has this name, and which was meant, or which stages have it."""
        owners = _owners(key, "key") if self.stage else ""
        if not owners:
            return f"unknown key {key}{did_you_mean(key, [*self.known, *self.tree])}"
        return f"stage {self.stage} has no key {key}{owners}"

    def _value(self, key: str, f: Any, stage: str, value: Any) -> Iterator[str]:
        if isinstance(value, str) and "${" in value:
            return  # known when it is composed
        node = OmegaConf.structured(type(self.runs[stage]))
        try:
            OmegaConf.update(node, key, value)
        except OmegaConfBaseException:
            yield f"{key} must be {type_text(f)}, got {text(value)}"
            return
        problem = value_problem(key, f, MISSING if value == MISSING else OmegaConf.select(node, key))
        if problem:
            yield problem


def _hydras(group: str, value: Any) -> Iterator[str]:
    """The problems of choosing a launcher, a sweeper or the like."""
    if "/" not in group or not isinstance(value, str) or not GlobalHydra.instance().is_initialized():
        return
    names = GlobalHydra.instance().config_loader().get_group_options(group)
    if names and value not in names:
        yield f"unknown {group} {value}{did_you_mean(value, names) or ';'} there are {listed(names)}"


def _owners(key: str, kind: str) -> str:
    """`; ppo and pipeline have it` for a key or group of other stages."""
    stages = [stage for stage in schema.STAGES if key in schema.keys(stage)]
    return f"; {listed(stages)} {'has' if len(stages) == 1 else 'have'} it" if stages else ""


DEEPSPEED = "strategy.deepspeed"
# what a command has once: stages share the loaded base, the store and the tracker
ONE_FOR_ALL = (
    "model",
    "device",
    "threads",
    "strategy",
    "tracking",
    "output_dir",
    "resume",
    "adapters",
    "upstream",
)


def settings(stage: str, given: Mapping[str, Any], tree: conftree.Tree) -> Settings:
    """Take `upstream.<stage>` apart: a text for a group is an option, dicts and dotted keys set values."""
    found = Settings()
    checker = Checker(tree, stage)

    def visit(prefix: str, items: Mapping[str, Any]) -> None:
        for name, value in items.items():
            key = f"{prefix}{name}"
            group = key.replace(".", "/")
            if group in conftree.EVERYWHERE or key.split(".")[0] in ONE_FOR_ALL:
                found.problems.append(f"{key} cannot be set for an upstream stage: it is one for all stages")
            elif group in tree and isinstance(value, str):
                found.options[group] = value
                found.problems += checker.option(group, value)
            elif isinstance(value, Mapping):
                visit(f"{key}.", value)
            else:
                found.values[key] = value
                found.problems += checker.entry(key, value)

    visit("", given)
    return found


def stage_of(parsed: Sequence[Override], tree: conftree.Tree) -> str | None:
    """The stage these overrides choose, by `stage=` or through the experiment; None where there is none."""
    chosen = {o.key_or_group: o.value() for o in parsed if o.key_or_group in ("stage", "experiment")}
    if "stage" in chosen:
        return chosen["stage"] if chosen["stage"] in schema.RUNS else None
    experiment = tree.get("experiment", {}).get(str(chosen.get("experiment")))
    return conftree.stage_of(experiment) if experiment else None


def no_stage(tree: conftree.Tree) -> str:
    """What to add where nothing chooses a stage."""
    experiments = listed(list(tree.get("experiment", {})), "or")
    return f"no stage: add stage={listed(schema.STAGES, 'or')}, or experiment={experiments}"


def check(lines: Sequence[str], tree: conftree.Tree) -> list[str]:
    """Every problem of the overrides, none of which sweeps; empty when Hydra can have them."""
    parsed, problems = parse(lines)
    stage = stage_of(parsed, tree)
    if not stage and not {"stage", "experiment"} & {o.key_or_group for o in parsed}:
        problems.append(no_stage(tree))
    checker = Checker(tree, stage)
    for override in parsed:
        problems += checker.override(override)
    return list(dict.fromkeys(problems))
