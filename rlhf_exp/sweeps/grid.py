"""The trials of a grid, known before the first one starts: their overrides as Hydra's basic sweeper makes them.

Composing a config takes 0.2 s, mostly for reading files. Trials that differ in plain values alone are read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from rlhf_exp import compose, conftree, overrides
from rlhf_exp.errors import InputError
from rlhf_exp.sweeps.trial import without_hydra


class Composed(NamedTuple):
    """One trial: its overrides, the composed config with Hydra's node, and what is wrong with it.

    problems: of values that do not go together; broken: why there is no config at all.
    """

    number: int
    overrides: list[str]
    config: DictConfig
    problems: list[str]
    broken: list[str]


def is_grid(config: DictConfig) -> bool:
    """Whether the sweeper is Hydra's own, which lists its trials at once."""
    return str(config.hydra.sweeper._target_).endswith(".BasicSweeper")


def listed(given: Sequence[str], config: DictConfig) -> list[list[str]]:
    """The overrides of each trial, Hydra's own left out. given: as Hydra gets them; config: with Hydra's node."""
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create())
    lines = [f"{key}={value}" for key, value in params.items()] + without_hydra(given)
    parsed, problems = overrides.parse(lines, GlobalHydra.instance().config_loader())
    if problems:
        raise InputError(problems)
    with compose.explained():
        batches = BasicSweeper.split_arguments(parsed, None)
    return [list(trial) for batch in batches for trial in batch]


def composed(trials: Sequence[Sequence[str]], tree: conftree.Tree) -> Iterator[Composed]:
    """Each trial's config, as Hydra would compose it. Call it inside `compose.session`."""
    known: dict[tuple[str, ...], DictConfig] = {}
    for number, lines in enumerate(trials):
        parsed, _ = overrides.parse([line for line in lines if not line.startswith("~")])
        files = tuple(one.input_line for one in parsed if not _is_value(one, tree))
        try:
            if files not in known:
                known[files] = compose.load([one.input_line for one in parsed])
            config = known[files].copy()
            with compose.explained():
                for one in parsed:
                    if _is_value(one, tree):
                        OmegaConf.update(config, one.key_or_group, one.value(), merge=True)
        except InputError as error:
            yield Composed(number, list(lines), DictConfig({}), [], error.problems)
            continue
        problems: list[str] = []
        try:
            compose.to_run(config)
        except InputError as error:
            problems = error.problems
        yield Composed(number, list(lines), config, problems, [])


def _is_value(one: Override, tree: conftree.Tree) -> bool:
    """Whether an override sets one value, and chooses no file."""
    plain = not (one.is_add() or one.is_force_add() or one.is_delete() or one.key_or_group in tree)
    return plain and not isinstance(one.value(), dict | list)
