"""Sampler and pruner from their config; every trial has a sampler of its own.

optuna's samplers that draw from a seed begin at the first draw again when a study is resumed, and would suggest what
they suggested before. Here trial n draws from (seed, n): a study that was interrupted, at whatever moment, goes on as
if it had not been. What samplers remember from trial to trial they have in the study itself.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import optuna
from hydra_plugins.rlhf_optuna._space import Space

from rlhf_exp.errors import InputError

TARGET, SEED = "_target_", "seed"


def sampler(config: Mapping[str, Any], space: Space, seed: int, *place: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial; place: its number, and what else sets it apart. InputError for wrong arguments."""
    kind, arguments = _target("sampler", config)
    if issubclass(kind, optuna.samplers.GridSampler):
        # one shuffle for all trials: its place in it is the trial's number
        return _make("sampler", kind, {"search_space": space.grid(), SEED: seed})
    arguments.pop(SEED, None)
    if issubclass(kind, optuna.samplers.QMCSampler):
        arguments[SEED] = seed  # one sequence for all trials
    elif SEED in inspect.signature(kind).parameters:
        arguments[SEED] = int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])
    return _make("sampler", kind, arguments)


def pruner(config: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    return _make("pruner", *_target("pruner", config))


def is_grid(config: Mapping[str, Any]) -> bool:
    return issubclass(_target("sampler", config)[0], optuna.samplers.GridSampler)


def _target(what: str, config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The class and its arguments; those that are null are left out."""
    arguments = {name: value for name, value in config.items() if value is not None}
    path = str(arguments.pop(TARGET, ""))
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise InputError(f"hydra.sweeper.{what}._target_: there is no {path or 'class'}") from None
    base = optuna.samplers.BaseSampler if what == "sampler" else optuna.pruners.BasePruner
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"hydra.sweeper.{what}._target_: {path} is no {what} of optuna's")
    return found, arguments


def _make(what: str, kind: type, arguments: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"hydra.sweeper.{what}: {error}") from None
    except ImportError as error:  # optuna says so when it is first used
        raise InputError(f"hydra.sweeper.{what}: {error}") from None
