"""A model's sizes: presets against the published configs, folders against their files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.memory import architecture
from rlhf_exp.model import shapes
from rlhf_exp.paths import conf_dir
from rlhf_exp.schema import Model
from tests.model.architectures import TABLE, conf, full_size

HUB = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml") if conf(path.stem).source == "hub")


@pytest.mark.parametrize("name", [name for name in TABLE if name != "tiny"])
def test_a_preset_gives_the_adapter_of_the_published_model(name):
    """The matrices that LoRA wraps, and all parameters, are those of the full-size model on the meta device."""
    built = {weight: tuple(p.shape) for weight, p in full_size(name).named_parameters()}
    if name == "gpt2":
        built = {key: shape[::-1] if key.endswith(shapes.CONV1D) else shape for key, shape in built.items()}
    model = conf(name)
    found = architecture.of_preset(model)
    assert found.adapter(model.lora_targets, 16) == shapes.lora_size(built, model.lora_targets, 16)
    assert found.parameters == pytest.approx(sum(map(math.prod, built.values())), rel=0.01)


@pytest.mark.parametrize("name", HUB)
def test_every_hub_model_can_be_planned_without_its_files(name):
    """What its matrices leave of the parameters is embeddings, output layer and vectors: at most two tables."""
    found = architecture.of_preset(conf(name))
    table = found.vocabulary * found.hidden
    assert found.kind == conf(name).architecture
    assert 0.5 * table <= found.by_token <= 2.1 * table + 2e7


def test_seventy_billion_by_hand():
    """80 layers of q and o 8192 x 8192, k and v 1024 x 8192, three 28672 x 8192; two tables of 32000 x 8192."""
    found = architecture.of_preset(conf("llama2_70b"))
    layer = 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    assert found.parameters == pytest.approx(80 * layer + 2 * 32000 * 8192, rel=0.0001)
    assert (found.query, found.key, found.inner) == (8192, 1024, 28672)
    # r (in + out) of the seven
    one = 2 * 16384 + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    assert found.adapter(conf("llama2_70b").lora_targets, 16) == 80 * 16 * one


def test_a_preset_without_numbers_is_no_architecture():
    assert architecture.of_preset(Model(name="mine", path="owner/mine")) is None
    assert architecture.of_preset(replace(conf("llama2_7b"), heads=None)) is None


def test_a_folder_and_its_files(tiny_path):
    """q and o 64 x 64, k and v 32 x 64, three 128 x 64; one tied table of 512 x 64; five norms."""
    found = architecture.of_folder(tiny_path, shapes.of_model(tiny_path))
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    assert found.parameters == 2 * layer + 512 * 64 + 5 * 64
    assert found.by_token == 512 * 64
    assert (found.kind, found.layers, found.hidden, found.inner) == ("llama", 2, 64, 128)
    assert (found.query, found.key, found.heads, found.head_size) == (64, 32, 4, 16)


def test_a_config_without_heads_is_said(tiny_path, tmp_path):
    config = json.loads((tiny_path / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not say how many heads"):
        architecture.of_folder(tmp_path, shapes.of_model(tiny_path))
