"""The shapes of a model's weights from the headers of its files: no torch, no weights read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.model import torchfile
from rlhf_exp.model.torchfile import Shapes

BIN = "pytorch_model*.bin"
# model_type -> the trunk's name in the model, and how tensors' names start in files that leave it out
TRUNK = {
    "gpt2": ("transformer", ("h.", "wte.", "wpe.", "ln_f.")),
    "bloom": ("transformer", ("h.", "word_embeddings", "ln_f.")),
    "opt": ("model", ("decoder.",)),
}
# GPT-2's matrices are stored [in, out]
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".q_attn.weight")
# what old files hold beside the weights: values for masks, rotary frequencies, and causal masks, which unlike the
# biases of the same name are no vectors
BUFFERS = (".masked_bias", ".inv_freq")
MASKS = (".attn.bias", ".attention.bias")
WIDTH = ("hidden_size", "n_embd", "n_embed", "d_model")  # what configs call it


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
    """All weights of a model's folder: its safetensors files, or else its pytorch_model*.bin.

    Raises InputError where there is neither, or not every file that the index names.
    """
    files, read, index = sorted(folder.glob("*.safetensors")), header, "model.safetensors.index.json"
    if not files:
        files, read, index = sorted(folder.glob(BIN)), torchfile.header, "pytorch_model.bin.index.json"
    if not files:
        raise InputError(f"{folder} has no weights: no *.safetensors and no {BIN}")
    found: Shapes = {}
    for file in sorted({*files, *_indexed(folder / index)}):
        found |= read(file)
    return _as_built(found, folder)


def _indexed(index: Path) -> set[Path]:
    """The files that an index names; none where there is no index."""
    try:
        return {index.parent / name for name in json.loads(index.read_text())["weight_map"].values()}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a sound index of weights: {error!r}") from error


def of_config(folder: Path) -> Shapes:
    """What the weights of a model would be, from its config.json alone. Imports torch, allocates nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_exp.model import loading

    config = loading.read_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **loading.OURS_ONLY)
    except Exception as error:  # a foreign file can make it say anything
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder / 'config.json'} describes no model: {reason}") from error
    return _as_built({name: tuple(weight.shape) for name, weight in model.named_parameters()}, folder)


def _as_built(shapes: Shapes, folder: Path) -> Shapes:
    """The tensors of files as the model in `folder` names them, matrices as [out, in], without buffers."""
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):  # said where the config is needed
        return shapes
    trunk, starts = TRUNK.get(kind, ("", ()))
    found: Shapes = {}
    for name, shape in shapes.items():
        if name.endswith(BUFFERS) or (name.endswith(MASKS) and len(shape) > 1):
            continue
        turned = kind == "gpt2" and name.endswith(CONV1D)
        found[f"{trunk}.{name}" if name.startswith(starts) else name] = shape[::-1] if turned else shape
    return found


def wrapped(shapes: Shapes, targets: Sequence[str]) -> Shapes:
    """Module name -> (out, in) of the matrices that LoRA would wrap, by PEFT's rule: the name's last part."""
    found = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and len(shape) == 2 and module.rpartition(".")[2] in targets:
            found[module] = shape
    return found


OUTPUT = ("lm_head", "embed_out", "output_layer")  # what models call their projection to the vocabulary


def require_targets(shapes: Shapes, targets: Sequence[str], model: str) -> None:
    """InputError that names every target no module of the model has, and what there is."""
    if heads := [target for target in targets if target in OUTPUT]:
        raise InputError(
            f"lora.targets: {', '.join(heads)} is the output layer, which is frozen and shared by all roles here (an "
            "adapter on it would have no effect): leave it out"
        )
    there = {name.split(".")[-2] for name, shape in shapes.items() if name.count(".") > 1 and len(shape) == 2}
    if missing := [target for target in targets if target not in there]:
        raise InputError(
            f"lora.targets: model {model} has no module {', '.join(missing)} (it has: {', '.join(sorted(there))})"
        )


def lora_size(shapes: Shapes, targets: Sequence[str], r: int, dora: bool = False) -> int:
    """Parameters of one adapter: A [r, in] and B [out, r] for every wrapped matrix; with DoRA [out] magnitudes."""
    return sum(r * sum(shape) + dora * shape[0] for shape in wrapped(shapes, targets).values())


@dataclass(frozen=True)
class Size:
    """What the memory estimate needs to know of a model."""

    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int


def output_width(folder: Path) -> int:
    """The length of the hidden states that heads read: OPT-350M projects its own to another."""
    config = _config(folder)
    width = config.get("word_embed_proj_dim") or next(
        (config[name] for name in WIDTH if name in config), None
    )
    if not isinstance(width, int):
        raise InputError(f"{folder / 'config.json'} does not say how wide the model is")
    return width


def q_head(kind: str, hidden_size: int, vocabulary: int) -> int:
    """Numbers of one Q head of ILQL (model/ilql_heads.py)."""
    d, v = hidden_size, vocabulary
    return {"mlp": 2 * d * d + 2 * d * v, "linear": d * v, "tied": 4 * d * d}[kind]


def context_of(folder: Path) -> int | None:
    """The longest sequence in tokens that the model has positions for; None where config.json does not say."""
    config = _config(folder)
    names = ("max_position_embeddings", "n_positions", "model_max_length", "seq_length")
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def model_type(folder: Path) -> str:
    """transformers' name of the architecture; "" where config.json does not say."""
    return str(_read_config(folder).get("model_type", ""))


def _config(folder: Path) -> dict[str, Any]:
    """config.json, of a model of text and images the part about text."""
    config = _read_config(folder)
    return config.get("text_config") or config


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        config.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} is not a model's config: {error}") from error
    return config


def size_of(folder: Path, weights: Shapes | None = None) -> Size:
    """From config.json and the weights' shapes, by default those of the folder's files."""
    try:
        config = _config(folder)
        layers = next(
            config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config
        )
        width = next(config[name] for name in WIDTH if name in config)
        vocabulary = config["vocab_size"]
    except (OSError, ValueError, KeyError, StopIteration, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} does not say the model's size: {error!r}") from error
    weights = of_model(folder) if weights is None else weights
    return Size(sum(math.prod(shape) for shape in weights.values()), layers, width, vocabulary)
