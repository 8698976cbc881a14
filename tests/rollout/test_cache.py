"""The cache that is written in place holds what transformers' holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_exp.rollout import cache as ours
from rlhf_exp.rollout.cache import cache_for

LLAMA = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


def states(b, length, generator):
    return [torch.randn(b, 2, length, 8, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("room", [1, 3, 64])
def test_it_holds_what_transformers_holds(monkeypatch, room):
    """A prompt, tokens one by one past the room, rows that leave, more tokens."""
    monkeypatch.setattr(ours, "ROOM", room)
    generator = torch.Generator().manual_seed(0)
    mine, theirs = cache_for(LLAMA), DynamicCache(config=LLAMA)
    b = 4
    for length in (5, 1, 1, 1, 1, 1, 0, 1, 1, 2):
        if length == 0:
            chosen = torch.tensor([2, 0])
            mine.reorder_cache(chosen)
            theirs.reorder_cache(chosen)
            b = 2
            continue
        for layer in range(2):
            new = states(b, length, generator)
            for found, wanted in zip(mine.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(found, wanted)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


def test_tokens_that_fit_are_not_copied():
    generator = torch.Generator().manual_seed(0)
    cache = cache_for(LLAMA)
    first, _ = cache.update(*states(2, 5, generator), 0)
    later, _ = cache.update(*states(2, 1, generator), 0)
    assert later.data_ptr() == first.data_ptr()


def test_windows_keep_their_own_layers():
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=5)
    kinds = [type(layer) for layer in cache_for(config).layers]
    assert kinds.count(DynamicSlidingWindowLayer) == 5
    assert DynamicLayer not in kinds
