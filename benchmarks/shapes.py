"""The two tasks that the PPO benchmark measures, and what is the same for every system."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORA_RANK, LORA_ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EPOCHS = 4
LR, KL_COEF, VF_COEF, GAMMA, LAM, CLIP = 1e-5, 0.05, 0.1, 1.0, 0.95, 0.2


@dataclass(frozen=True)
class Shape:
    """A model and a batch. Answers always have `response` tokens: EOS is a token that is (nearly) never drawn."""

    name: str
    prompt: int
    response: int
    batch: int
    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    kv_size: int  # key-value heads times their size

    def folder(self) -> Path:
        """The model's folder: fetched, or random weights from seed 0 with a tokenizer of plain words."""
        if self.name == "smollm2":
            from rlhf_exp.fetch import model_folder

            found = model_folder("smollm2_135m")
            if found is None:
                raise SystemExit("smollm2 is not here: run `python -m rlhf_exp.fetch smollm2_135m` once")
            return found
        folder = Path(tempfile.gettempdir(), f"rlhf_exp_bench_{self.name}_{self.vocabulary}")
        if not (folder / "tokenizer.json").is_file():
            _draw(self, folder)
        return folder

    def eos(self, tokenizer: Any) -> str:
        """A token that the model has no reason to write, so that no answer ends early in any system."""
        return "<reponame>" if self.name == "smollm2" else tokenizer.eos_token

    def prompts(self) -> list[list[int]]:
        import torch

        draw = torch.Generator().manual_seed(1)
        # ids from 1000: no special token is among them
        return torch.randint(1000, self.vocabulary, (self.batch, self.prompt), generator=draw).tolist()

    def flops(self) -> float:
        """What an iteration needs, in multiplications and additions of matrix products.

        A forward costs 2 operations a weight and token, a backward as many again, for the base is frozen: there
        are gradients of inputs, not of weights. LoRA's own products and attention's are counted, the vocabulary
        at answer positions only. Rollout (which gives old log-probs and values for nothing), reward, reference;
        then the epochs.
        """
        d, k, m, r = self.hidden, self.kv_size, self.intermediate, LORA_RANK
        pairs = ((d, d), (d, k), (d, k), (d, d), (d, m), (d, m), (m, d))  # in, out of the seven
        base = self.layers * sum(a * b for a, b in pairs)
        lora = self.layers * sum(r * (a + b) for a, b in pairs)
        length = self.prompt + self.response
        tokens = self.batch * length
        attention = 2 * self.layers * 2 * d * tokens * length / 2  # scores and sums, the causal half
        trunk = 2 * tokens * (base + lora) + attention
        head = 2 * self.batch * self.response * d * self.vocabulary
        # backward: inputs' gradients through all, weights' gradients of LoRA
        backward = trunk + 2 * tokens * lora + attention + head
        return (trunk + head) + trunk + (trunk + head) + EPOCHS * (trunk + head + backward)


SHAPES = {
    "llama": Shape("llama", 64, 64, 16, 512, 8, 32_000, 1376, 512),
    "smollm2": Shape("smollm2", 64, 48, 16, 576, 30, 49_152, 1536, 192),
    "small": Shape("small", 16, 8, 4, 64, 2, 2_000, 128, 64),  # to try the script
}


def _draw(shape: Shape, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    heads = shape.hidden // 64
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    ).save_pretrained(folder)
