"""Sweeps: what is checked before the first trial, and what became of the trials.

Hydra's sweepers stop reading results at the first failed trial, after printing it; here every trial is heard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rlhf_exp import compose, conftree, overrides
from rlhf_exp.errors import InputError

HERE = "basic"  # Hydra's own launcher and sweeper: one trial after the other, in this process


@dataclass
class Plan:
    """The overrides as Hydra is to have them, whether it is a sweep, and the (first) composed config.

    swept: the keys that have several values, or that the sweeper chooses. first: the overrides with the first value
    of each key.
    """

    overrides: list[str]
    multirun: bool
    config: DictConfig
    swept: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)


@dataclass
class Failure:
    """A job that raised."""

    number: int | None
    overrides: list[str]
    error: BaseException


def plan(given: Sequence[str], multirun: bool = False) -> Plan:
    """Check every override, and in a sweep every value it lists, before anything starts.

    What is wrong only for some pairs of swept values is not looked for: those trials fail, the others run.
    Call it inside `compose.session`. Raises InputError with all problems.
    """
    tree = compose.tree()
    parsed, unreadable = overrides.parse(given, GlobalHydra.instance().config_loader())
    first = [overrides.variants(override)[0] for override in parsed]
    problems = [*unreadable, *overrides.check(first, tree), *_values(first, parsed, tree)]
    if problems:
        raise InputError(dict.fromkeys(problems))
    config = compose.load(first)
    swept = [override for override in parsed if override.is_sweep_override()]
    # another launcher's, without -m, is a sweep of one trial; a sweeper that searches is one of many
    chosen = config.hydra.runtime.choices
    elsewhere = any(chosen.get(f"hydra/{part}") != HERE for part in ("launcher", "sweeper"))
    multirun = multirun or config.hydra.mode == RunMode.MULTIRUN or elsewhere
    if not multirun:
        if swept:
            many = "has several values: add -m to run a trial for each"
            raise InputError([f"{override.input_line} {many}" for override in swept])
        compose.to_run(config)
        return Plan(compose.opened(given), False, config, [], compose.opened(first))
    if not _numbered(config):
        raise InputError("hydra.sweep.subdir: leave it out, the folders of trials are numbered")
    swept += _sweeper_params(first, config, tree)
    compose.to_run(config, across=not swept)
    for override in swept:
        if override.key_or_group in tree:
            for line in overrides.variants(override)[1:]:
                compose.to_run(compose.load(_with(first, override, line)), across=False)
    keys = [override.key_or_group for override in swept]
    ready = _late(parsed) if {"stage", "experiment"} & set(keys) else given
    return Plan(compose.opened(ready), True, config, keys, compose.opened(first))


def _numbered(config: DictConfig) -> bool:
    """Whether a trial's folder bears its number."""
    node = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    return node["subdir"] == "${hydra.job.num}"


def _with(first: Sequence[str], override: Override, line: str) -> list[str]:
    """`first` with another value for one override."""
    key = override.key_or_group
    return [*(other for other in first if other.lstrip("+").partition("=")[0] != key), line]


def _values(first: Sequence[str], parsed: Sequence[Override], tree: conftree.Tree) -> Iterator[str]:
    """The problems of the second and later values of every override that sweeps."""
    for override in parsed:
        for line in overrides.variants(override)[1:]:
            yield from overrides.check(_with(first, override, line), tree)


def _sweeper_params(first: Sequence[str], config: Any, tree: conftree.Tree) -> list[Override]:
    """What `sweep=<option>` sweeps over, checked like the command line."""
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create())
    parsed, problems = overrides.parse([f"{key}={value}" for key, value in params.items()])
    for override in parsed:
        for line in overrides.variants(override):
            problems += overrides.check(_with(first, override, line), tree)
    if problems:
        option = config.hydra.runtime.choices.get("sweep")
        source = f"sweep={option}" if option else "hydra.sweeper.params"
        raise InputError(dict.fromkeys(f"{source}: {problem}" for problem in problems))
    return parsed


def _late(parsed: Sequence[Override]) -> list[str]:
    """Overrides that wait for the trial: where stages are swept, the sweep itself has no schema for them."""
    lines = []
    for override in parsed:
        waits = not (override.is_sweep_override() or override.is_hydra_override())
        value = override.get_value_element_as_str() if waits else ""
        lines.append(f"{override.get_key_element()}=choice({value})" if waits else override.input_line)
    return lines


@contextmanager
def checked() -> Iterator[None]:
    """Every trial of a grid has been composed: Hydra's sweeper need not do it again."""
    original = (
        Sweeper.validate_batch_is_legal
    )  # of the base class: Hydra's scanner has a copy of BasicSweeper
    Sweeper.validate_batch_is_legal = lambda self, batch: None
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = original


@contextmanager
def failures() -> Iterator[list[Failure]]:
    """Collect the jobs that raised, where reading their result would print one and raise.

    `JobReturn.return_value` is what Hydra, every launcher and every sweeper reads after a job, be it of this
    process or sent back by a node. A failed job has None as its result.
    """
    found: dict[int, Failure] = {}
    original = JobReturn.return_value

    def read(job: JobReturn) -> Any:
        if job.status != JobStatus.FAILED:
            return original.fget(job)
        number = OmegaConf.select(job.hydra_cfg, "hydra.job.num") if job.hydra_cfg is not None else None
        found[id(job)] = Failure(number, list(job.overrides or ()), job._return_value)
        return None

    result: list[Failure] = []
    JobReturn.return_value = property(read, original.fset)
    try:
        yield result
    finally:
        JobReturn.return_value = original
        result += found.values()
