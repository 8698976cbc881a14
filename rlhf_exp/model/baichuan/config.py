"""config.json of the Baichuan family.

One `model_type` stands for four models, and the architecture's name does not tell them apart (Baichuan-7B says
BaiChuanForCausalLM, all others BaichuanForCausalLM). What does:

| | positions | told by | output layer | told by |
|---|---|---|---|---|
| Baichuan-7B    | rotary | max_position_embeddings | linear   | vocab_size 64000 |
| Baichuan-13B   | ALiBi  | only model_max_length   | linear   | vocab_size 64000 |
| Baichuan2-7B   | rotary | max_position_embeddings | NormHead | vocab_size 125696 |
| Baichuan2-13B  | ALiBi  | only model_max_length   | NormHead | vocab_size 125696 |

`z_loss_weight` is a field of Baichuan 2 alone, which many of its fine-tuned descendants carry.
"""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedConfig

BAICHUAN2_VOCABULARY = 125696


class BaichuanConfig(PreTrainedConfig):
    """Defaults are those of Baichuan-7B, but for the two fields that tell the models apart."""

    model_type: ClassVar[str] = "baichuan"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 64000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None  # None: ALiBi
    model_max_length: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    z_loss_weight: float | None = None
    norm_head: bool | None = None  # None: by the rule of `normalises_head`; False once it is folded
    # what transformers' shared modules ask for
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    def validate_architecture(self) -> None:
        """Called by transformers. Raises ValueError."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )

    @property
    def alibi(self) -> bool:
        """Whether positions are a bias on attention (Press et al. 2022) instead of a rotation."""
        return self.max_position_embeddings is None

    @property
    def normalises_head(self) -> bool:
        """Whether the output layer's rows count by direction only (NormHead, Yang et al. 2023, "Optimizations").

        A vocabulary at or above Baichuan 2's is one with tokens added; Baichuan 1 has half as many.
        """
        if self.norm_head is not None:
            return self.norm_head
        return self.z_loss_weight is not None or self.vocab_size >= BAICHUAN2_VOCABULARY
