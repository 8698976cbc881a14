"""Every model of conf/model that transformers builds by itself: its config, in full size and scaled down.

The full-size numbers are those of the published config.json, written out here; the small ones keep what is
particular (grouped heads, biases, sliding windows, projections), and shrink the rest.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
import yaml

from rlhf_exp.model import frozen_linear
from rlhf_exp.model.base import Base
from rlhf_exp.paths import conf_dir
from rlhf_exp.schema import Model

VOCABULARY, EOS = 97, 2
_NEOX = ("GPTNeoXConfig", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}})
_OPT = ("OPTConfig", {"dropout": 0.0, "max_position_embeddings": 2048})
_GLM = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}}


def _sizes(
    layers: int, hidden: int, inner: int, heads: int, kv: int | None = None, **more: Any
) -> dict[str, Any]:
    named = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
    named |= {"num_attention_heads": heads} | ({"num_key_value_heads": kv} if kv else {})
    return named | more


def _opt(layers: int, hidden: int, inner: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "ffn_dim": inner,
        "num_attention_heads": heads,
    } | more


# name: (config class, what both sizes have), full size, scaled down
TABLE: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        ("LlamaConfig", {"tie_word_embeddings": True}),
        _sizes(2, 64, 128, 4, 2),
        _sizes(2, 32, 64, 4, 2),
    ),
    "smollm2_135m": (
        ("LlamaConfig", {"tie_word_embeddings": True}),
        _sizes(30, 576, 1536, 9, 3),
        _sizes(2, 36, 64, 9, 3),
    ),
    "gemma3_270m": (
        ("Gemma3TextConfig", {}),
        _sizes(18, 640, 2048, 4, 1, head_dim=256, sliding_window=512),
        # the sixth layer sees everything, the others five tokens: fewer than the prompts below have
        _sizes(6, 32, 64, 4, 1, head_dim=16, query_pre_attn_scalar=16, sliding_window=5),
    ),
    "gpt2": (
        ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        {"n_layer": 12, "n_embd": 768, "n_head": 12},
        {"n_layer": 2, "n_embd": 32, "n_head": 4},
    ),
    "gptj6b": (
        ("GPTJConfig", {}),
        {"n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64},
        {"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 4},
    ),
    "pythia_1b": (_NEOX, _sizes(16, 2048, 8192, 8), _sizes(2, 32, 64, 2)),
    "pythia_2.8b": (_NEOX, _sizes(32, 2560, 10240, 32), _sizes(2, 32, 64, 4)),
    "pythia_6.9b": (_NEOX, _sizes(32, 4096, 16384, 32), _sizes(2, 32, 64, 4)),
    "opt350m": (
        _OPT,
        _opt(24, 1024, 4096, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        _opt(2, 32, 64, 4, word_embed_proj_dim=16, do_layer_norm_before=False),
    ),
    "opt1.3b": (_OPT, _opt(24, 2048, 8192, 32), _opt(2, 32, 64, 4)),
    "bloom_560m": (
        ("BloomConfig", {}),
        {"n_layer": 24, "hidden_size": 1024, "n_head": 16},
        {"n_layer": 2, "hidden_size": 32, "n_head": 4},
    ),
    "bloom_7b1": (
        ("BloomConfig", {}),
        {"n_layer": 30, "hidden_size": 4096, "n_head": 32},
        {"n_layer": 2, "hidden_size": 36, "n_head": 6},  # not a power of two: the slopes have another rule
    ),
    "llama2_7b": (("LlamaConfig", {}), _sizes(32, 4096, 11008, 32), _sizes(2, 32, 64, 4)),
    "llama2_70b": (("LlamaConfig", {}), _sizes(80, 8192, 28672, 64, 8), _sizes(2, 32, 64, 4, 2)),
    "llama3_8b": (("LlamaConfig", {}), _sizes(32, 4096, 14336, 32, 8), _sizes(2, 32, 64, 4, 2)),
    "qwen2.5_0.5b": (
        ("Qwen2Config", {"tie_word_embeddings": True}),
        _sizes(24, 896, 4864, 14, 2),
        _sizes(2, 28, 64, 14, 2),
    ),
    "qwen2.5_7b": (("Qwen2Config", {}), _sizes(28, 3584, 18944, 28, 4), _sizes(2, 32, 64, 4, 2)),
    "qwen3_0.6b": (
        ("Qwen3Config", {"tie_word_embeddings": True}),
        _sizes(28, 1024, 3072, 16, 8, head_dim=128),
        _sizes(2, 32, 64, 4, 2, head_dim=16),
    ),
    "qwen3_8b": (
        ("Qwen3Config", {}),
        _sizes(36, 4096, 12288, 32, 8, head_dim=128),
        _sizes(2, 32, 64, 4, 2, head_dim=8),
    ),
    "internlm3_8b": (
        ("InternLM3Config", {}),
        _sizes(48, 4096, 10240, 32, 2, head_dim=128),
        _sizes(2, 32, 64, 4, 2, head_dim=8),
    ),
    "glm4_9b": (
        ("Glm4Config", _GLM),
        _sizes(40, 4096, 13696, 32, 2, head_dim=128, attention_bias=False),
        _sizes(2, 32, 64, 4, 2, head_dim=8, attention_bias=False),
    ),
}


def conf(name: str) -> Model:
    """conf/model/NAME.yaml."""
    return Model(**yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def full_size(name: str) -> transformers.PreTrainedModel:
    """The model with the published sizes on the meta device: shapes without numbers."""
    (kind, both), sizes, _ = TABLE[name]
    config = getattr(transformers, kind)(**both, **sizes, vocab_size=conf(name).vocab_size or 512)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def small_config(name: str) -> transformers.PreTrainedConfig:
    (kind, both), _, sizes = TABLE[name]
    return getattr(transformers, kind)(
        **both, **sizes, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=EOS
    )


def small_base(name: str, folder: Any = None) -> Base:
    """The scaled-down model with random weights large enough for predictions to depend on the whole text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(small_config(name), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=1 / parameter.shape[-1] ** 0.5)
                else:  # biases, and norms whose neutral element is 1, or 0 as in Gemma
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    model.requires_grad_(False).eval()
    frozen_linear.install(model)  # as load_base does
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=0)
    return Base(model, tokenizer, folder, "hash", torch.float32, torch.device("cpu"))
