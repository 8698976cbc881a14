"""What DeepSpeed is told where nobody says it: sizes of what is there, in place of its own billions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_exp.schema import Strategy
from rlhf_exp.strategies import parameters, zero_adamw


def layer(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, 1, bias=False))


def test_two_layers_are_whole_at_once():
    """The larger layer has 3 x 3 + 3 numbers; the table of 100 is no layer."""
    trunk = nn.Module()
    trunk.table, trunk.layers = nn.Embedding(50, 2), nn.ModuleList([layer(2), layer(3)])
    assert parameters.live(trunk) == {
        "stage3_max_live_parameters": 24,
        "stage3_max_reuse_distance": 12,
        "stage3_prefetch_bucket_size": 12,
    }
    assert parameters.largest_layer(layer(4)) == 20  # no list: all of it


@pytest.mark.parametrize(("given", "size"), [({}, 30), ({"reduce_bucket_size": 1000}, 1000)])
def test_the_buffer_has_room_for_the_largest_group(given, size, monkeypatch):
    """Of two groups of 30 and 7 numbers; DeepSpeed takes the buffer anew in each step."""
    told = []
    monkeypatch.setattr("deepspeed.initialize", lambda **settings: told.append(settings["config"]) or [None])
    copies = zero_adamw.Copies([[torch.zeros(5, 6)], [torch.zeros(7)]])
    zero_adamw.engine(copies, None, Strategy(name="zero2", deepspeed={"zero_optimization": given}))
    assert told[0]["zero_optimization"] == {"reduce_bucket_size": size, "stage": 2}


@pytest.mark.parametrize("given", ["stage3_max_live_parameters", "max_live_parameters"])
def test_what_is_given_is_taken(given, monkeypatch):
    """Under either of DeepSpeed's names."""
    told = []

    def initialize(**settings):
        told.append(settings["config"]["zero_optimization"])
        raise RuntimeError("enough")

    monkeypatch.setattr("deepspeed.initialize", initialize)
    model = nn.Module()
    model.trunk = nn.ModuleList([layer(2)])
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    base = type("Base", (), {"trunk": model.trunk, "model": model, "dtype": torch.float32})()
    strategy = Strategy(name="zero3", deepspeed={"zero_optimization": {given: 5}})
    with pytest.raises(RuntimeError, match="enough"):
        parameters.shard(base, strategy)
    (found,) = told
    assert found[given] == 5
    assert len([key for key in found if key.endswith("max_live_parameters")]) == 1
    assert found["stage3_prefetch_bucket_size"] == 6
