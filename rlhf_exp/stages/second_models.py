"""What stands in memory beside the base and is no adapter on it: a judge with files of its own, sentence encoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from rlhf_exp.errors import InputError
from rlhf_exp.memory import activations, architecture
from rlhf_exp.memory.activations import FLOAT
from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.memory.counted import BYTES, Beside
from rlhf_exp.model import shapes
from rlhf_exp.model.base import resolve_dtype
from rlhf_exp.rewards import functions, judge, relevance
from rlhf_exp.schema import JUDGE, EvalRun, PreferRun, Run

ENCODER = "relevance"  # the rule that loads one
MODEL = functions.JUDGES[1]  # of eval.judge


def of_config(config: Run, base: Architecture, dtype: str, device: str) -> tuple[Beside, ...]:
    """Those whose files are here. base, dtype: the run's own, which may be the judge."""
    found = [_encoder(folder) for folder in encoders(config)]
    if isinstance(config, EvalRun | PreferRun) and asks_judge(config):
        found.append(_judge(config, base, dtype, device))
    return tuple(model for model in found if model is not None)


def asks_judge(config: EvalRun | PreferRun) -> bool:
    """Whether a language model compares answers."""
    return config.eval.judge == MODEL if isinstance(config, EvalRun) else JUDGE in config.prefer.labellers


def _judge(config: EvalRun | PreferRun, base: Architecture, dtype: str, device: str) -> Beside | None:
    """A model of its own is loaded in what its device is good at, whatever model.dtype says."""
    settings = config.judge
    if settings.model == judge.OWN_BASE:
        tokens = settings.batch_size * settings.max_tokens
        return Beside("judge", 0.0, activations.passing(base, BYTES[dtype], tokens))
    folder = _here(lambda: judge.locate(settings)) if settings.model else None
    if folder is None:
        return None
    planned = config.dry_run and config.memory.device == "cuda"  # a device that this machine may not have
    width = BYTES["bfloat16" if planned else resolve_dtype("auto", device)]
    longest = min(settings.max_tokens, shapes.context_of(folder) or settings.max_tokens)
    return _beside("judge", folder, width, settings.batch_size * longest)


def encoders(config: Run) -> list[Path]:
    """The folders of the sentence encoders that a stage's rules and eval.encoder name, each once."""
    specs = [spec.partition(":") for spec in functions.of_config(config).values()]
    asked = [argument for name, _, argument in specs if name == ENCODER]
    found = [_here(lambda folder=folder: relevance.locate(folder)) for folder in asked]
    if isinstance(config, EvalRun) and config.eval.encoder is not None:
        found.append(_here(lambda: relevance.find(config.eval.encoder)))
    return list(dict.fromkeys(folder for folder in found if folder is not None))


def _encoder(folder: Path) -> Beside:
    positions = shapes.context_of(folder) or relevance.SHORT
    return _beside("encoder", folder, FLOAT, relevance.BATCH * relevance.longest(folder, positions))


def _here(locate: Callable[[], Path | None]) -> Path | None:
    """A folder with a config.json; None where there is none: what is wrong with the setting is said elsewhere."""
    try:
        folder = locate()
    except InputError:
        return None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _beside(role: str, folder: Path, width: int, tokens: int) -> Beside | None:
    try:
        weights = shapes.of_model(folder)
    except InputError:
        return None
    numbers = sum(math.prod(shape) for shape in weights.values())
    try:
        forward = activations.passing(architecture.of_folder(folder, weights), width, tokens)
    except InputError:  # a config that names its sizes otherwise: the weights are known all the same
        forward = 0.0
    return Beside(role, float(numbers * width), forward)
