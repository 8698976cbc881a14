"""upstream.sft={lora: full}: weights drawn anew, trained, and then the one base of all later stages."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import SHORT_PPO, call, records, runs

FULL = "upstream.sft={lora: full, train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"
SHORT = (*SHORT_PPO, "upstream.reward={train: {steps: 1, batch_size: 4, micro_batch_size: 4}}")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_base")
    result = call(*SHORT, FULL, "model.from_scratch=true", f"output_dir={folder}")
    assert result.code == 0, result.err
    return folder


def test_all_stages_stand_on_the_weights_of_sft(output):
    found = records(output)
    assert {stage: len(of) for stage, of in found.items()} == {"sft": 1, "reward": 1, "ppo": 1}
    (sft,), (reward,), (ppo,) = found["sft"], found["reward"], found["ppo"]
    new = f"sft:{sft['key']}"
    assert (reward["inputs"]["base"]["hash"], ppo["inputs"]["base"]["hash"]) == (new, new)
    assert sft["inputs"]["base"]["hash"].startswith("scratch:0:")
    assert set(reward["inputs"]["parents"]) == {"sft"}
    (folder,) = runs(output, "sft")
    assert not (folder / "adapter").exists()
    from rlhf_exp.model.base import content_hash

    (trained,) = runs(output, "ppo")
    assert json.loads((trained / "adapter/base.json").read_text())["hash"] == content_hash(folder / "model")


def test_the_same_command_takes_what_is_there(output):
    before = records(output)
    assert call(*SHORT, FULL, "model.from_scratch=true", f"output_dir={output}").code == 0
    assert records(output) == before


def test_weights_from_scratch_come_from_the_seed(tmp_path):
    from rlhf_exp.model.base import load_base
    from rlhf_exp.schema import Model

    model = Model(name="tiny", source="builtin", dtype="float32", from_scratch=True)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, same, other = (load_base(model, "cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.hash == same.hash != other.hash
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, same.model.state_dict()[name])
        if value.ndim > 1:
            assert not torch.equal(value, other.model.state_dict()[name])
    made = load_file(one.path / "model.safetensors")
    assert not torch.equal(
        one.model.state_dict()["model.embed_tokens.weight"], made["model.embed_tokens.weight"]
    )


def test_a_folder_without_weights_is_enough(tmp_path, output):
    (sft,) = runs(output, "sft")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((sft / "model" / name).read_bytes())
    words = ("stage=sft", "model=tiny", f"model.path={tmp_path}", "model.from_scratch=true", "lora=full")
    result = call(*words, "dry_run=true", f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    assert "all weights" in result.out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ("stage=ppo", "lora=full"),
            "lora.full is for sft, not for ppo: the other stages share one base",
        ),
        (("stage=ppo", "model.from_scratch=true"), "model.from_scratch=true gives random weights"),
        (("stage=sft", "model.from_scratch=true"), "add lora=full"),
    ],
)
def test_what_cannot_be(tmp_path, words, problem):
    result = call(*words, "model=tiny", "tracking=none", f"output_dir={tmp_path}")
    assert result.code == 2 and len(result.errors) == 1 and problem in result.err


def test_a_whole_model_is_no_adapter(output, tmp_path):
    (sft,) = runs(output, "sft")
    result = call(*SHORT_PPO, f"adapters.sft={sft}", f"output_dir={tmp_path}")
    assert result.code == 2
    assert f"set model.path={sft / 'model'} adapters.sft=base" in result.err
    words = (f"model.path={sft / 'model'}", "adapters.sft=base", "dry_run=true")
    assert call(*SHORT_PPO, *words, f"output_dir={tmp_path}").code == 0
