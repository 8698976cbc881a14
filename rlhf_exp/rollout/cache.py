"""A key-value cache that is written in place: transformers' copies all that is there for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens that fit in before the next copy


def cache_for(config: Any) -> DynamicCache:
    """transformers' cache for a model of this config; layers that keep all tokens have room."""
    cache = DynamicCache(config=config)
    cache.layers = [_Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Layer(DynamicLayer):
    """`keys` and `values` [B, G, L, h] are the front of what is held."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._held: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        past, length = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if self._held is None or length > self._held[0].shape[2]:
            self._hold(key_states, value_states, past, length + ROOM)
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, past:length] = new
        self.keys, self.values = (held[:, :, :length] for held in self._held)
        return self.keys, self.values

    def _hold(self, key_states: Tensor, value_states: Tensor, past: int, size: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = tuple(x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states))
        if past:
            for new, old in zip(held, (self.keys, self.values), strict=True):
                new[:, :, :past] = old
        self._held = held

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._held = None
