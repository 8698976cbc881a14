"""The shapes of a model's weights from the headers of its safetensors files: no torch, no weights read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.errors import InputError

Shapes = dict[str, tuple[int, ...]]


def header(path: Path) -> Shapes:
    """Tensor name -> shape of one safetensors file.

    Raises InputError if the file is not one, or is shorter or longer than its header says: cut off in a copy.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= 100_000_000:
                raise ValueError("its header has no length")
            entries = json.loads(file.read(size))
            total = os.fstat(file.fileno()).st_size
        entries.pop("__metadata__", None)
        end = 8 + size + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != total:
            raise ValueError(f"it has {total} bytes, its header says {end}")
        return {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a sound safetensors file: {error}") from error


def of_model(folder: Path) -> Shapes:
    """All weights of a model's folder. Raises InputError where there is no safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no *.safetensors weights")
    found: Shapes = {}
    for file in files:
        found |= header(file)
    return found


def wrapped(shapes: Shapes, targets: Sequence[str]) -> Shapes:
    """Module name -> (out, in) of the matrices that LoRA would wrap, by PEFT's rule: the name's last part."""
    found = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and len(shape) == 2 and module.rpartition(".")[2] in targets:
            found[module] = shape
    return found


def require_targets(shapes: Shapes, targets: Sequence[str], model: str) -> None:
    """InputError that names every target no module of the model has, and what there is."""
    there = {name.split(".")[-2] for name, shape in shapes.items() if name.count(".") > 1 and len(shape) == 2}
    if missing := [target for target in targets if target not in there]:
        raise InputError(
            f"lora.targets: model {model} has no module {', '.join(missing)} (it has: {', '.join(sorted(there))})"
        )


def lora_size(shapes: Shapes, targets: Sequence[str], r: int) -> int:
    """Parameters of one adapter: A [r, in] and B [out, r] for every wrapped matrix."""
    return sum(r * sum(shape) for shape in wrapped(shapes, targets).values())


@dataclass(frozen=True)
class Size:
    """What the memory estimate needs to know of a model."""

    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int


def context_of(folder: Path) -> int | None:
    """The longest sequence in tokens that the model has positions for; None where config.json does not say."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "model_max_length", "seq_length")
    return next((config[name] for name in names if config.get(name)), None)


def size_of(folder: Path) -> Size:
    """From config.json and the weights' headers."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config") or config
        layers = next(
            config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config
        )
        width = next(config[name] for name in ("hidden_size", "n_embd", "d_model") if name in config)
        vocabulary = config["vocab_size"]
    except (OSError, ValueError, KeyError, StopIteration, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} does not say the model's size: {error!r}") from error
    return Size(sum(math.prod(shape) for shape in of_model(folder).values()), layers, width, vocabulary)
