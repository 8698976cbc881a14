"""The model of the random walks: its tokenizer, its build, how it is found by name."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from rlhf_exp.errors import InputError
from rlhf_exp.model import builtin, letters
from rlhf_exp.model.base import load_base, resolve
from rlhf_exp.schema import Model


@pytest.fixture(scope="module")
def folder():
    return builtin.build("randomwalks")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_a_token_a_letter_and_back(tokenizer):
    ids = tokenizer("bcza", add_special_tokens=False)["input_ids"]
    assert ids == [3, 4, 27, 2]
    assert tokenizer.batch_decode([[*ids, 1]], skip_special_tokens=True) == ["bcza"]
    assert tokenizer("B é", add_special_tokens=False)["input_ids"] == [0, 0, 0]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (1, 1, 28)


def test_it_is_a_model_folder_like_any_other(folder):
    base = load_base(Model(name="randomwalks", source="builtin", dtype="float32"), "cpu")
    assert base.path == folder
    assert base.output_layer[0].shape == (28, 64)
    assert base.output_layer[0] is not base.model.get_input_embeddings().weight
    ids = torch.tensor([[3, 4, 5]])
    assert torch.isfinite(base.trunk(input_ids=ids).last_hidden_state).all()


def test_from_scratch_draws_from_the_seed_with_the_width_of_the_recipe(folder):
    model = Model(name="randomwalks", source="builtin", dtype="float32", from_scratch=True)
    weights = [load_base(model, "cpu", seed=seed).output_layer[0] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].std()) == pytest.approx(64**-0.5, rel=0.05)


def test_building_leaves_the_random_state_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path))
    before = torch.get_rng_state()
    folder = letters.build_letters()
    assert torch.equal(before, torch.get_rng_state())
    assert folder.parent == tmp_path / "models"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_models_are_found_by_name(tiny_path, folder):
    assert resolve(Model(name="tiny", source="builtin")) == tiny_path
    assert resolve(Model(name="randomwalks", source="builtin")) == folder
    with pytest.raises(
        InputError, match=r"model mine has source=builtin, but the package makes tiny, randomwalks"
    ):
        resolve(Model(name="mine", source="builtin"))
