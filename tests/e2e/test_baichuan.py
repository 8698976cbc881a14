"""The command line on scaled-down Baichuan folders: every stage, from the files as they are published."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.model.baichuan_folder import LAYERS, weights_of, write_baichuan

WORDS = (
    "stage=ppo",
    "model=baichuan7b",
    "dataset=reviews",
    "model.dtype=float32",
    "threads=1",
    "tracking=none",
    "ppo.steps=2",
    "ppo.batch_size=4",
    "ppo.micro_batch_size=4",
    "ppo.epochs=1",
    "generation.max_new_tokens=6",
    "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}",
    "upstream.reward={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}",
)


@pytest.mark.parametrize(
    "kind, weights", [("7b", "bin"), ("baichuan2-13b", "safetensors")], ids=["7b", "baichuan2-13b"]
)
def test_sft_reward_and_ppo_run(cli, tmp_path, kind, weights):
    folder = write_baichuan(tmp_path / "model", kind, weights)
    result = cli.call(*WORDS, f"model.path={folder}", f"output_dir={tmp_path}/out")
    assert result.code == 0, result.out + result.err
    records = cli.records(tmp_path / "out")
    assert {stage: len(found) for stage, found in records.items()} == {"sft": 1, "reward": 1, "ppo": 1}
    names = {
        f"base_model.model.model.layers.{layer}.self_attn.W_pack.lora_{side}.weight"
        for layer in range(LAYERS)
        for side in "AB"
    }
    for stage in records:
        adapter = next((tmp_path / "out" / stage).glob("*/**/adapter_model.safetensors"))
        tensors = load_file(adapter)
        assert set(tensors) == names
        assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name), stage
    metrics = cli.lines(next((tmp_path / "out" / "ppo").glob("*/metrics.jsonl")))
    first = metrics[0]
    assert first["objective/kl"] == 0 and first["first/approxkl"] == 0 and first["policy/grad_norm"] > 0
    assert first["rollout/logprob_difference_max"] < 1e-4  # cached decoding against a whole forward
    # the same command again trains nothing
    again = cli.call(*WORDS, f"model.path={folder}", f"output_dir={tmp_path}/out")
    assert again.code == 0 and len(cli.runs(tmp_path / "out")) == 3


class Call:
    def __reduce__(self):
        return os.mkdir, ("run",)


def test_weights_that_name_code_are_bad_input(cli, tmp_path, nothing_loads):
    folder = write_baichuan(tmp_path / "model", "7b", shards=1)
    torch.save(weights_of("7b") | {"trap": Call()}, folder / "pytorch_model.bin")
    result = cli.call(*WORDS, f"model.path={folder}")
    assert result.code == 2
    assert len(result.errors) == 1 and "it asks for" in result.errors[0]
    assert not (tmp_path / "run").exists()


def test_answers_longer_than_the_context_are_bad_input(cli, tmp_path, nothing_loads):
    """Of the 13B models model_max_length says how long."""
    folder = write_baichuan(tmp_path / "model", "13b")
    config = json.loads((folder / "config.json").read_text()) | {"model_max_length": 60}
    (folder / "config.json").write_text(json.dumps(config))
    result = cli.call(*WORDS, f"model.path={folder}", "dataset.max_prompt_tokens=55")
    assert result.code == 2
    assert any("has positions for 60" in line for line in result.errors)
