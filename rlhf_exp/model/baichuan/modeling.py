"""The Baichuan models under their published names of weights.

They are Llamas (Touvron et al. 2023) with q, k and v packed into one matrix, `W_pack`; the 13B models put ALiBi
in the place of rotary positions, and Baichuan 2 normalises the rows of its output layer. What is Llama's
comes from transformers' Llama.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from rlhf_exp.model.baichuan import alibi
from rlhf_exp.model.baichuan.config import BaichuanConfig
from rlhf_exp.model.sharing import NAME as PAIRS

FOLD_ROWS = 8192  # of the output layer normalised at once, in float32


class BaichuanAttention(nn.Module):
    """Causal self-attention; `rotary` is (cos, sin), or None where `attention_mask` holds ALiBi's bias."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, d] -> [B, T, d] and, from the eager implementation, the weights [B, heads, T, keys]."""
        batch, length, width = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each [B, heads, T, head_dim]
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        if attention_mask is not None and attention_mask.is_floating_point() and implementation != PAIRS:
            attention_mask = attention_mask.to(query.dtype)  # under autocast the layers compute lower
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(batch, length, width)), weights


class BaichuanLayer(GradientCheckpointingLayer):
    """Attention and gated MLP, each on normed inputs and added to the stream."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    config: BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["BaichuanLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": BaichuanLayer,
        "attentions": BaichuanAttention,
    }


class BaichuanModel(BaichuanPreTrainedModel):
    """Token ids -> hidden states after the final norm."""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BaichuanLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.alibi else LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids int64[B, T]; attention_mask [B, past + T], 0 at padding; position_ids int64[B, T].

        ALiBi goes by the places in the batch, of which padding on one side changes no difference, and reads no
        position_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = hidden.shape[1]
        if position_ids is None:
            position_ids = (torch.arange(length, device=hidden.device) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            allow_is_causal_skip=not self.config.alibi or past_key_values is None,
        )
        rotary = None
        if self.config.alibi and self.config._attn_implementation == PAIRS:
            mask = alibi.by_key(self.config.num_attention_heads, length, hidden.device)
        elif self.config.alibi:
            mask = alibi.merged(self.config.num_attention_heads, mask, length, past, hidden)
        else:
            rotary = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden, rotary=rotary, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """The model with its output layer."""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).fold_norm_head()
        return loaded

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> BaichuanForCausalLM:
        """What AutoModelForCausalLM.from_config calls."""
        model = super()._from_config(*args, **kwargs)
        model.fold_norm_head()
        return model

    @torch.no_grad()
    def fold_norm_head(self) -> None:
        """Replace the output layer's rows by w / |w|, once: from here on it is a plain linear layer.

        NormHead computes hidden @ (w / |w|).T. This project reads log-probs off hidden @ weight.T in more than one
        place (generation, scoring, KL), and all of them are right only if the weight in memory is the effective
        one. The config says so afterwards (norm_head False), hence a second call, or loading what this model
        saved, normalises nothing again, and a head that is trained further is one without the constraint. The
        files that it was loaded from stay as they are.
        """
        if not self.config.normalises_head:
            return
        for rows in self.lm_head.weight.split(FOLD_ROWS):
            rows.copy_(nn.functional.normalize(rows.float(), dim=-1))
        self.config.norm_head = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As BaichuanModel's; labels int64[B, T] with -100 where nothing is learned."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self._logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        if not self.config.normalises_head:
            return self.lm_head(hidden)
        # constructed by hand and not folded: the weight may be trained under the constraint
        return nn.functional.linear(hidden, nn.functional.normalize(self.lm_head.weight, dim=-1))
