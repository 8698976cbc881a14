"""The sizes of a model that its memory depends on: from its folder, or from its preset where no file is here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.model import shapes
from rlhf_exp.model.shapes import Shapes
from rlhf_exp.schema import Model

# what config.json files call the same thing; the first that is there
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
INNER = ("intermediate_size", "ffn_dim", "n_inner")
HEADS = ("num_attention_heads", "n_head")
GROUPS = ("num_key_value_heads", "multi_query_group_num")
# of architectures whose matrices do not have Llama's names: [out, in] in units of d (hidden), m (inner),
# q (heads x size), k (key-value heads x size)
LLAMA = {
    "q_proj": "qd",
    "k_proj": "kd",
    "v_proj": "kd",
    "o_proj": "dq",
    "gate_proj": "md",
    "up_proj": "md",
    "down_proj": "dm",
}
_NEOX = {"query_key_value": "pd", "dense": "dq", "dense_h_to_4h": "md", "dense_4h_to_h": "dm"}
MATRICES: dict[str, dict[str, str]] = {
    "baichuan": {"W_pack": "pd"} | {name: LLAMA[name] for name in list(LLAMA)[3:]},
    "gpt2": {"c_attn": "pd", "attn.c_proj": "dq", "c_fc": "md", "mlp.c_proj": "dm"},
    "gptj": {name: LLAMA[name] for name in list(LLAMA)[:3]}
    | {"out_proj": "dq", "fc_in": "md", "fc_out": "dm"},
    "gpt_neox": _NEOX,
    "bloom": _NEOX,
    "opt": {name: LLAMA[name] for name in list(LLAMA)[:3]} | {"out_proj": "dq", "fc1": "md", "fc2": "dm"},
    "glm4": {name: LLAMA[name] for name in list(LLAMA)[:4]} | {"gate_up_proj": "gd", "down_proj": "dm"},
}


@dataclass(frozen=True)
class Architecture:
    """What the memory plan knows of a model; numbers, not bytes."""

    kind: str  # transformers' model_type
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    inner: int  # width of the MLP
    heads: int
    groups: int  # key-value heads
    head_size: int
    weights: Shapes = field(repr=False, compare=False)
    by_token: int = 0  # parameters with a row for each token: embeddings and output layer
    window: int | None = None  # tokens that a layer's cache keeps at most, of `windowed` layers
    windowed: int = 0

    @property
    def query(self) -> int:
        """Width of a token's queries, all heads together."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Width of a token's keys, and of its values."""
        return self.groups * self.head_size

    @property
    def layer(self) -> float:
        """Parameters of one layer, on average."""
        return (self.parameters - self.by_token) / self.layers

    def adapter(self, targets: Sequence[str], r: int, dora: bool = False) -> int:
        """Numbers of one LoRA adapter."""
        return shapes.lora_size(self.weights, targets, r, dora)


def of_folder(folder: Path, weights: Shapes) -> Architecture:
    """From a model's config.json and the shapes of its weights. InputError where it does not say."""
    size = shapes.size_of(folder, weights)
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config") or config
    heads = _first(config, HEADS)
    if heads is None:
        raise InputError(f"{folder / 'config.json'} does not say how many heads the model has")
    inner = _first(config, INNER) or 4 * size.hidden_size
    groups = _first(config, GROUPS) or heads
    head = config.get("head_dim") or size.hidden_size // heads
    kinds = config.get("layer_types") or []
    windowed = sum(kind == "sliding_attention" for kind in kinds)
    by_token = sum(
        math.prod(shape) for shape in weights.values() if len(shape) == 2 and shape[0] == size.vocab_size
    )
    return Architecture(
        kind=str(config.get("model_type", "")).removesuffix("_text"),
        parameters=size.parameters,
        layers=size.layers,
        hidden=size.hidden_size,
        vocabulary=size.vocab_size,
        inner=inner,
        heads=heads,
        groups=groups,
        head_size=head,
        weights=weights,
        by_token=by_token,
        window=config.get("sliding_window") if windowed else None,
        windowed=windowed,
    )


def _first(config: dict[str, Any], names: Sequence[str]) -> int | None:
    return next((config[name] for name in names if config.get(name)), None)


def of_preset(model: Model) -> Architecture | None:
    """From a preset's numbers (conf/model); None where it has none."""
    facts = (model.billion_params, model.layers, model.hidden_size, model.vocab_size, model.heads)
    if None in facts:
        return None
    heads, hidden = model.heads, model.hidden_size
    groups, head = model.kv_heads or heads, model.head_size or hidden // heads
    inner = model.inner_size or 4 * hidden
    units = {"d": hidden, "m": inner, "q": heads * head, "k": groups * head, "g": 2 * inner}
    units["p"] = units["q"] + 2 * units["k"]
    names = MATRICES.get(model.architecture or "llama", LLAMA)
    weights = {
        f"layers.{i}.{name}.weight": tuple(units[unit] for unit in pair)
        for i in range(model.layers)
        for name, pair in names.items()
    }
    inside = sum(math.prod(shape) for shape in weights.values())
    parameters = int(model.billion_params * 1e9)
    return Architecture(
        kind=model.architecture or "llama",
        parameters=parameters,
        layers=model.layers,
        hidden=hidden,
        vocabulary=model.vocab_size,
        inner=inner,
        heads=heads,
        groups=groups,
        head_size=head,
        weights=weights,
        by_token=max(0, parameters - inside),
    )
