"""Models beside the base: a judge with files of its own, sentence encoders; bytes by hand, no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_exp.memory import architecture
from rlhf_exp.memory.counted import Beside
from rlhf_exp.model import shapes
from rlhf_exp.schema import Evaluation, Judge, Prefer, RewardSource
from rlhf_exp.stages import second_models

# the tiny model: two layers of d 64, m 128, 4 heads of 16 on 2 key heads, a table of 512, five norms
TINY = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) + 512 * 64 + 5 * 64
# a token of its forward: the stream twice, then gate, up and their product (attention is narrower)
TOKEN = 2 * 64 + 3 * 128


@pytest.fixture
def base(tiny_path: Path) -> architecture.Architecture:
    return architecture.of_folder(tiny_path, shapes.of_model(tiny_path))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A BERT of one layer: 30 words, 24 positions, d 8, m 16; sentences of at most 20 tokens."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {"model_type": "bert", "vocab_size": 30, "max_position_embeddings": 24} | sizes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    save_file(
        {"words": torch.zeros(30, 8), "layer.0.up.weight": torch.zeros(16, 8)}, folder / "model.safetensors"
    )
    return folder


def of(config: Any, base: architecture.Architecture, dtype: str = "bfloat16") -> tuple[Beside, ...]:
    return second_models.of_config(config, base, dtype, "cpu")


def test_a_judge_of_its_own_is_loaded_in_its_own_dtype(run_config, base, tiny_path, monkeypatch):
    """Float32 where its device does not multiply bfloat16, whatever the run's base is in."""
    monkeypatch.setattr(second_models, "resolve_dtype", lambda dtype, device: "float32")
    positions = json.loads((tiny_path / "config.json").read_text())["max_position_embeddings"]
    settings = Judge(model=str(tiny_path), batch_size=3, max_tokens=70)
    assert positions > 70
    expected = (Beside("judge", 4.0 * TINY, 3 * 70 * 4 * TOKEN),)
    assert of(run_config("eval", eval=Evaluation(judge="model"), judge=settings), base) == expected
    assert of(run_config("prefer", prefer=Prefer(labellers=["judge"]), judge=settings), base) == expected
    assert of(run_config("eval", eval=Evaluation(judge="length"), judge=settings), base) == ()
    assert of(run_config("sft"), base) == ()


def test_a_judge_reads_no_more_than_it_has_positions_for(run_config, base, tiny_path, monkeypatch):
    monkeypatch.setattr(second_models, "resolve_dtype", lambda dtype, device: "float32")
    positions = json.loads((tiny_path / "config.json").read_text())["max_position_embeddings"]
    settings = Judge(model=str(tiny_path), batch_size=1, max_tokens=10**6)
    (found,) = of(run_config("eval", eval=Evaluation(judge="model"), judge=settings), base)
    assert found.forward == positions * 4 * TOKEN


def test_the_base_as_judge_takes_a_forward_alone(run_config, base):
    settings = Judge(model="base", batch_size=2, max_tokens=100)
    found = of(run_config("eval", eval=Evaluation(judge="model"), judge=settings), base)
    assert found == (Beside("judge", 0.0, 2 * 100 * 2 * TOKEN),)


def test_what_is_not_here_is_not_counted(run_config, base, tmp_path):
    (tmp_path / "empty").mkdir()
    for model in ("someone/a-judge-that-is-not-here", str(tmp_path / "empty"), None):
        config = run_config(
            "eval", eval=Evaluation(judge="model", encoder="nobody/nothing"), judge=Judge(model=model)
        )
        assert of(config, base) == ()


@pytest.mark.parametrize("stage", ["ppo", "eval"])
def test_an_encoder_is_counted_once(stage, run_config, ppo_config, base, encoder):
    """In float32: 30 * 8 + 16 * 8 numbers; 64 texts of 20 tokens, each the stream twice and attention's 6 * 8."""
    rule = f"relevance:{encoder}"
    if stage == "ppo":
        config = ppo_config(reward_source={"kind": "sum", "parts": [f"1*{rule}", "0.5*length"], "gold": rule})
    else:
        source = RewardSource(kind="function", function="length")
        config = run_config("eval", eval=Evaluation(gold=rule, encoder=str(encoder)), reward_source=source)
    assert of(config, base) == (Beside("encoder", 4.0 * (240 + 128), 64 * 20 * 4 * (2 * 8 + 6 * 8)),)
