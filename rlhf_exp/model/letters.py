"""The model of the random walks: a small Llama whose tokens are the letters a to z, and its tokenizer.

Its weights say nothing: `model.from_scratch=true` draws them from the seed of the run, and `lora=full` trains them.
What an adapter on it can reach at temperature 1 is bounded by what stays frozen, the final norm and the output
layer: so that its logits can lie far apart, the output layer is its own (not the embedding) and the initial weights
are large, ~ N(0, 1 / width) as in Vaswani et al. 2017 instead of the usual 0.02.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.model import builtin

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

UNKNOWN, EOS = "<unk>", "<eos>"  # ids 0, 1; padding is EOS, as in SmolLM2: masks come from lengths
WIDTH = 64
RECIPE: dict[str, Any] = {
    "version": 1,  # raise it when the code below changes what is built
    "seed": 0,
    "tokens": [UNKNOWN, EOS, *string.ascii_lowercase],
    "config": {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": WIDTH**-0.5,
        "tie_word_embeddings": False,
    },
}


def build_letters() -> Path:
    """The model's folder (config.json, model.safetensors, tokenizer.json ...), built on the first call."""
    return builtin.once("randomwalks", json.dumps(RECIPE, sort_keys=True).encode(), _save)


def _save(folder: Path) -> None:
    builtin.write(folder, _model(), _tokenizer())


def _tokenizer() -> PreTrainedTokenizerBase:
    """A token a character; what is no letter of a to z is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: id for id, token in enumerate(RECIPE["tokens"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=EOS, pad_token=EOS
    )


def _model() -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **RECIPE["config"],
        vocab_size=len(RECIPE["tokens"]),
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):  # the global generator must not notice that the cache was cold
        torch.manual_seed(RECIPE["seed"])
        return LlamaForCausalLM(config)
