"""A prompt that two answers share is computed once: the attention of pairs that are laid out in one row.

    with shared(base.model, packed.spans):
        hidden = base.trunk(input_ids=packed.ids, position_ids=packed.positions, use_cache=False).last_hidden_state

A token sees what comes before it in its own prompt and answer, and nothing else. Each pair is two slices of the row:
prompt with chosen answer, which stand together, and the rejected answer behind the same prompt. So no mask over the
whole row is made, and nothing is computed only to be masked. The function goes in where transformers looks for one
(AttentionInterface), and by hand into the two architectures that do not look: GPT-J and BLOOM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rlhf_exp.model.slices import Text, attend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "rlhf_exp_pairs"


KINDS = {"full_attention", "sliding_attention"}  # of layers


class Unsupported(Exception):
    """What the model asks of its attention is not done here; the message says what."""


# innermost last: an attention function is given no more than its layer's tensors
_now: list[tuple[PreTrainedModel, list[Text]]] = []
_windows: set[int] | None = None


@contextmanager
def shared(model: PreTrainedModel, spans: Sequence[tuple[int, int, int, int]]) -> Iterator[None]:
    """Inside, forwards of one row [1, T] compute the pairs of `spans`.

    Each is (first place, tokens of the prompt, of the chosen, of the rejected answer). A backward may come later; one
    that recomputes activations does it in `again`. Forwards raise Unsupported where the model's attention does more
    than is done here; a model that never asks for this attention is not noticed.
    """
    with _sharing(model, texts_of(spans)):
        yield


def again() -> AbstractContextManager[None]:
    """What is shared here and now, for a forward that comes later."""
    return _sharing(*_now[-1]) if _now else nullcontext()


@contextmanager
def _sharing(model: PreTrainedModel, texts: list[Text]) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _interface)
    config, before = model.config, model.config._attn_implementation
    own = _own_attentions(model)
    config._attn_implementation = NAME
    for module, name, function in own:
        setattr(module, name, MethodType(function, module))
    _now.append((model, texts))
    try:
        yield
    finally:
        _now.pop()
        for module, name, _ in own:
            delattr(module, name)
        config._attn_implementation = before


@contextmanager
def windows_seen() -> Iterator[set[int]]:
    """Collects the windows that attentions ask for inside."""
    global _windows
    _windows = set()
    try:
        yield _windows
    finally:
        _windows = None


def windows_of(config: PreTrainedConfig) -> set[int] | None:
    """The sliding windows that a model's layers have by its config; None where it has other restrictions."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and set(kinds) - KINDS:
        return None
    used = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return {window} if window and used else set()


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query [1, heads, T, d], key and value [1, groups, T, d] -> [1, T, heads, d]."""
    if asked := [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]:
        raise Unsupported(f"its attention has {asked[0]}")
    if _windows is not None and sliding_window is not None:
        _windows.add(sliding_window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = _attend(query, key, value, scaling, attention_mask, sliding_window, dropout)
    return found.transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    bias: Tensor | None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The texts of the row, each by itself: [1, heads, T, d].

    bias [1, heads, 1, T] is added to the scores by the place of the key, as if the row were one text. It has to be
    linear in the place (ALiBi), where only differences count: the rejected answer takes what the places right behind
    its prompt would take.
    """
    if len(query) != 1 or (bias is not None and bias.shape[-2] != 1):
        raise Unsupported("its attention has a mask of its own")
    if dropout:
        raise Unsupported("its attention has dropout")
    return attend(query, key, value, _now[-1][1], scaling, bias, window)


def texts_of(spans: Sequence[tuple[int, int, int, int]]) -> list[Text]:
    """Two texts a pair: the chosen answer stands with the prompt, the rejected one sees the prompt before itself."""
    found = []
    for start, prompt, chosen, rejected in spans:
        middle = start + prompt + chosen
        found.append(Text(slice(start, start), slice(start, middle)))
        found.append(Text(slice(start, start + prompt), slice(middle, middle + rejected)))
    return found


# ---------------------------------------------------------------- architectures with an attention of their own


def _own_attentions(model: PreTrainedModel) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
    """(module, name of its method, what takes its place) where AttentionInterface is not looked at."""
    own = {"GPTJAttention": ("_attn", _gptj), "BloomAttention": ("forward", _bloom)}
    kinds = ((module, own.get(type(module).__name__)) for module in model.modules())
    return [(module, *found) for module, found in kinds if found is not None]


def _gptj(
    self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> tuple[Tensor, None]:
    return _attend(query, key, value, 1 / float(self.scale_attn), None), None


def _bloom(
    self: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """BloomAttention.forward; alibi [heads, 1, T] is slope times the key's place (Press, Smith & Lewis 2022)."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    found = _attend(query, key, value, self.inv_norm_factor, alibi.unsqueeze(0))
    merged = found.transpose(1, 2).reshape(hidden_states.shape)
    return self.dense(merged) + residual, None
