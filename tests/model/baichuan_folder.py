"""A scaled-down Baichuan model in a folder that looks as the published ones do.

The weights are drawn here and written with torch or safetensors under the published names, not by the code under
test. `baichuan1.model` and `baichuan2.model` were trained with sentencepiece 0.2.3 (BPE, byte fallback, split digits,
identity normalisation, 1000 pieces) on the package's reviews and a few lines of Chinese, with the published kinds
of user-defined symbols; Baichuan 1's adds a dummy prefix, Baichuan 2's does not and has runs of spaces.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
VOCABULARY, WIDTH, LAYERS, GATED = 1000, 48, 2, 96
# kind: (heads, architecture and config class, tokenizer class, entries that tell the models apart)
KINDS = {
    "7b": (4, "BaiChuan", {"max_position_embeddings": 4096}),
    "13b": (6, "Baichuan", {"model_max_length": 4096}),
    "baichuan2-7b": (
        4,
        "Baichuan",
        {"max_position_embeddings": 4096, "model_max_length": 4096, "z_loss_weight": 0},
    ),
    "baichuan2-13b": (6, "Baichuan", {"model_max_length": 4096, "z_loss_weight": 0}),
}
PLAIN = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": True}


def config_of(kind: str) -> dict:
    """config.json as published, but for the sizes."""
    heads, name, telling = KINDS[kind]
    return {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_baichuan.{name}Config",
            "AutoModelForCausalLM": f"modeling_baichuan.{name}ForCausalLM",
        },
        "tokenizer_class": f"{name}Tokenizer",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": GATED,
        "model_type": "baichuan",
        "num_attention_heads": heads,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.29.1",
        "use_cache": True,
        "vocab_size": VOCABULARY,
        **telling,
    }


def weights_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Published name -> tensor. Matrices ~ N(0, 1 / fan_in), norms near 1, rows of the head of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(WIDTH, generator=generator)).to(dtype)

    found = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH) * 4}
    for layer in range(LAYERS):
        found |= {
            f"model.layers.{layer}.self_attn.W_pack.weight": draw(3 * WIDTH, WIDTH),
            f"model.layers.{layer}.self_attn.o_proj.weight": draw(WIDTH, WIDTH),
            f"model.layers.{layer}.mlp.gate_proj.weight": draw(GATED, WIDTH),
            f"model.layers.{layer}.mlp.down_proj.weight": draw(WIDTH, GATED),
            f"model.layers.{layer}.mlp.up_proj.weight": draw(GATED, WIDTH),
            f"model.layers.{layer}.input_layernorm.weight": norm(),
            f"model.layers.{layer}.post_attention_layernorm.weight": norm(),
        }
    lengths = 1 + torch.rand(VOCABULARY, 1, generator=generator)
    return found | {
        "model.norm.weight": norm(),
        "lm_head.weight": draw(VOCABULARY, WIDTH) * lengths.to(dtype),
    }


def write_baichuan(
    folder: Path,
    kind: str = "7b",
    weights: str = "bin",
    shards: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write config, weights and tokenizer of a `kind` of KINDS; weights are "bin" or "safetensors"."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights_of(kind, seed, dtype)
    if kind == "7b":  # the published file holds these buffers
        head = WIDTH // KINDS[kind][0]
        for layer in range(LAYERS):
            frequencies = 10000.0 ** -(torch.arange(0, head, 2) / head)
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    _write_weights(folder, tensors, weights, shards)
    (folder / "config.json").write_text(json.dumps(config_of(kind), indent=2))
    first = kind in ("7b", "13b")
    shutil.copy(HERE / ("baichuan1.model" if first else "baichuan2.model"), folder / "tokenizer.model")
    name = KINDS[kind][1]
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    described = {
        "auto_map": {"AutoTokenizer": [f"tokenization_baichuan.{name}Tokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": f"{name}Tokenizer",
        **{key: {"__type": "AddedToken", "content": token, **PLAIN} for key, token in tokens.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({key: {"content": token, **PLAIN} for key, token in tokens.items()})
    )
    # the code that must never run
    trap = f"raise AssertionError('the code of {folder.name} was run')\n"
    for part in ("configuration", "modeling", "tokenization"):
        (folder / f"{part}_baichuan.py").write_text(trap)
    return folder


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], kind: str, shards: int) -> None:
    stem, ending = ("pytorch_model", "bin") if kind == "bin" else ("model", "safetensors")
    names = [f"{stem}.{ending}"]
    if shards > 1:
        names = [f"{stem}-{i + 1:05}-of-{shards:05}.{ending}" for i in range(shards)]
    parts: list[dict[str, torch.Tensor]] = [{} for _ in names]
    for i, (name, tensor) in enumerate(tensors.items()):
        parts[i * shards // len(tensors)][name] = tensor.contiguous()
    for name, part in zip(names, parts, strict=True):
        if kind == "bin":
            torch.save(part, folder / name)
        else:
            from safetensors.torch import save_file

            save_file(part, folder / name, metadata={"format": "pt"})
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
