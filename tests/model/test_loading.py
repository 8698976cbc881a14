"""Folders that are not what they say: code of their own, parts missing, logits bent after the output layer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_exp.errors import InputError
from rlhf_exp.model.base import FILES, TOKENIZER, content_hash, load_base, resolve
from rlhf_exp.schema import Model


@pytest.fixture
def folder(tmp_path, tiny_path) -> Path:
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def load(folder: Path):
    return load_base(Model(name="m", path=str(folder), dtype="float32"), "cpu")


def test_code_that_comes_with_a_model_never_runs(folder, tmp_path):
    """Not even where somebody answers `y` to the question that transformers would ask."""
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"},
    )
    code = (
        "import sys; from rlhf_exp.model.base import load_base; from rlhf_exp.schema import Model; "
        "load_base(Model(name='m', path=sys.argv[1]), 'cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], input="y\ny\n", capture_output=True, text=True
    )
    assert not (tmp_path / "ran").exists()
    assert "comes with code of its own (auto_map in config.json), which is not run here" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "layers.1" not in name}, folder / "model.safetensors"
    )
    with pytest.raises(
        InputError, match=r"not a whole model of its config.json: model\.layers\.1\..*and \d+ more"
    ):
        load(folder)


def test_weights_for_another_shape_are_refused(folder):
    edit(folder, num_hidden_layers=3)
    with pytest.raises(InputError, match="not a whole model of its config"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot"),
        ("[1]", "cannot read the tokenizer|cannot load"),
        ('{"model_type": "llama", "hidden_size": "64"}', "cannot"),
    ],
)
def test_a_config_that_is_none(folder, content, problem):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=problem):
        load(folder)


def test_logits_that_are_bent_after_the_output_layer():
    from transformers import AutoModelForCausalLM, GemmaConfig, RecurrentGemmaConfig

    from rlhf_exp.model.loading import require_straight_logits

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    straight = AutoModelForCausalLM.from_config(
        GemmaConfig(vocab_size=64, num_key_value_heads=1, head_dim=16, **sizes), dtype=torch.float32
    )
    require_straight_logits(straight, Path("straight"))
    config = RecurrentGemmaConfig(vocab_size=64, lru_width=32, logits_soft_cap=0.1, **sizes)
    bent = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(InputError, match="changes its logits after the output layer"):
        require_straight_logits(bent, Path("bent"))


def test_dropout_of_the_models_own_is_off(tmp_path):
    from transformers import BioGptConfig

    from rlhf_exp.model.loading import read_config

    BioGptConfig(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)


def test_what_decides_token_ids_is_in_the_content_hash(folder):
    assert set(TOKENIZER) <= set(FILES)
    before = content_hash(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert content_hash(folder) != before


@pytest.mark.parametrize(
    "stray", ["onnx/model.safetensors", "onnx/config.json", "original/tokenizer.model", ".git/config.json"]
)
def test_what_lies_in_folders_beside_the_model_is_not_part_of_it(folder, stray):
    """Exports, checkpoints and other people's formats; transformers reads none of them."""
    before = content_hash(folder), load(folder).tokenizer_key
    (folder / stray).parent.mkdir()
    (folder / stray).write_bytes(b"{}")
    (folder / "checkpoint-500").mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / "checkpoint-500" / name).write_bytes(b"{}")
    assert (content_hash(folder), load(folder).tokenizer_key) == before


def test_templates_in_their_folder_are_part_of_it(folder):
    before = content_hash(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    assert content_hash(folder) != before


def test_an_interrupted_download_is_no_model(tmp_path, folder, monkeypatch):
    import huggingface_hub

    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_bytes((folder / "config.json").read_bytes())
    asked = []

    def snapshot(*_, local_files_only=False, **__):
        asked.append(local_files_only)
        return str(part if local_files_only else folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model = Model(name="m", path="owner/name")
    assert resolve(model) is None
    assert resolve(model, download=True) == folder
    assert asked == [True, True, False]
