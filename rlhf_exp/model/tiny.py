"""The model of tests and of `experiment=smoke`: a Llama of 0.1 M parameters and a tokenizer, both built here.

Nothing is downloaded: the weights come from a seed, the tokenizer from the reviews that the package ships.
Like SmolLM2 it ties its embeddings, groups its key-value heads, starts no text with a BOS, and pads with its
EOS (id 2): code that tells padding by the token's identity fails on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.errors import InputError
from rlhf_exp.model import builtin
from rlhf_exp.paths import PACKAGE

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

TEXT = PACKAGE / "data" / "reviews.jsonl"
# ids 0, 1, 2 as in SmolLM2: unknown, BOS, EOS = PAD
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
RECIPE: dict[str, Any] = {
    "version": 1,  # raise it when the code below changes what is built
    "seed": 0,
    "special": SPECIAL,
    "config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


def build_tiny() -> Path:
    """The model's folder (config.json, model.safetensors, tokenizer.json ...), built on the first call.

    Its name holds a hash of the recipe and the text.
    """
    return builtin.once("tiny", json.dumps(RECIPE, sort_keys=True).encode() + _text(), _save)


def _text() -> bytes:
    try:
        return TEXT.read_bytes()
    except OSError as error:
        raise InputError(f"a file of the package is missing: {TEXT}; reinstall rlhf-exp") from error


def _save(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    unknown, bos, eos = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(), unk_token=unknown, bos_token=bos, eos_token=eos, pad_token=eos
    )
    builtin.write(folder, _model(), tokenizer)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _train_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text goes through it and comes back, nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["config"]["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = [json.loads(line) for line in _text().decode().splitlines() if line.strip()]
    tokenizer.train_from_iterator(_strings(rows), trainer)
    return tokenizer


def _model() -> LlamaForCausalLM:
    """Weights ~ N(0, 1 / fan_in), norms 1, drawn in order of name by a generator of our own (float32)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # constructing a model draws from the global generator, which must not notice that the cache was cold
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(
            LlamaConfig(**RECIPE["config"], unk_token_id=0, bos_token_id=1, eos_token_id=2, pad_token_id=2)
        )
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
            _draw(weight, generator)
    return model


def _draw(weight: torch.Tensor, generator: torch.Generator) -> None:
    if weight.ndim == 1:
        weight.fill_(1.0)
    else:
        weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
