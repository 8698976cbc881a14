"""A Baichuan folder as published: its names, its formats of weights, its code that is never run."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_exp.errors import InputError
from rlhf_exp.model import baichuan, shapes, torchfile
from rlhf_exp.model.base import Base, content_hash, load_base, resolve
from rlhf_exp.schema import Model
from tests.model.baichuan_folder import KINDS, VOCABULARY, weights_of, write_baichuan

IDS = torch.arange(3, 12)[None]


def load(folder: Path, dtype: str = "float32") -> Base:
    return load_base(Model(name="baichuan", path=str(folder), dtype=dtype), "cpu")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_folders_own_code_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    """Its files raise when they are imported; transformers asks at the terminal before it runs such code."""

    def asked(*_: object) -> str:
        raise AssertionError("transformers asked whether to run the folder's code")

    monkeypatch.setattr(builtins, "input", asked)
    for kind in KINDS:
        base = load(write_baichuan(tmp_path / kind, kind))
        assert type(base.model).__name__ == "BaichuanForCausalLM"
        assert type(base.model).__module__ == "rlhf_exp.model.baichuan.modeling"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights, shards", [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)])
def test_weights_keep_their_published_names(tmp_path, kind, weights, shards):
    folder = write_baichuan(tmp_path / "model", kind, weights, shards)
    before = contents(folder)
    state = load(folder).model.state_dict()
    expected = weights_of(kind)
    if kind.startswith("baichuan2"):
        head = expected["lm_head.weight"].double()
        expected["lm_head.weight"] = (head / head.square().sum(1, keepdim=True).sqrt()).float()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert (state[name] - tensor).abs().max() < 1e-7, name
    assert contents(folder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_as_the_same_model(tmp_path, kind):
    """Of NormHead too: what was normalised once is not normalised again, whatever it has become."""
    first = load(write_baichuan(tmp_path / "model", kind))
    with torch.no_grad():
        first.model.lm_head.weight *= 1.5  # as if it had been trained
    first.model.save_pretrained(tmp_path / "saved")
    first.tokenizer.save_pretrained(tmp_path / "saved")
    second = load(tmp_path / "saved")
    assert torch.equal(second.model(IDS).logits, first.model(IDS).logits)
    assert second.model.config.alibi == ("13b" in kind)
    names = {name for name in shapes.of_model(tmp_path / "saved")}
    assert names == set(weights_of(kind))


def test_no_tensor_of_the_files_is_missing_or_left_over(tmp_path):
    """Baichuan-7B's files hold rotary frequencies, which are computed."""
    baichuan.register()
    folder = write_baichuan(tmp_path / "model", "7b", shards=1)
    assert any("inv_freq" in name for name in torchfile.header(folder / "pytorch_model.bin"))
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report


def test_bfloat16_heads_are_normalised_in_float32(tmp_path):
    head = load(write_baichuan(tmp_path / "model", "baichuan2-7b"), "bfloat16").output_layer[0]
    rows = weights_of("baichuan2-7b")["lm_head.weight"].bfloat16().double()
    assert head.dtype == torch.bfloat16
    assert torch.equal(head, (rows / rows.norm(dim=1, keepdim=True)).bfloat16())


def test_a_model_drawn_from_its_config_has_a_folded_head(tmp_path):
    baichuan.register()
    folder = write_baichuan(tmp_path / "model", "baichuan2-13b")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert model.dtype == torch.bfloat16  # rounds each number by at most 2^-8 of itself, and so the norm
    assert (model.lm_head.weight.double().norm(dim=1) - 1).abs().max() <= 2**-8
    assert model.config.norm_head is False


def test_registering_again_changes_nothing():
    baichuan.register()
    baichuan.register()
    assert AutoConfig.for_model("baichuan").model_type == "baichuan"


# ---------------------------------------------------------------- before anything is loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights, shards", [("bin", 1), ("bin", 3), ("safetensors", 2)])
def test_shapes_are_read_without_loading(tmp_path, kind, weights, shards):
    folder = write_baichuan(tmp_path / "model", kind, weights, shards, dtype=torch.bfloat16)
    expected = {name: tuple(tensor.shape) for name, tensor in weights_of(kind).items()}
    found = shapes.of_model(folder)
    assert {name: shape for name, shape in found.items() if "inv_freq" not in name} == expected
    shapes.require_targets(found, ["W_pack"], "baichuan")
    # A [4, 48] and B [144, 4] in each of two layers
    assert shapes.lora_size(found, ["W_pack"], 4) == 2 * 4 * (48 + 144)
    assert shapes.context_of(folder) == 4096
    size = shapes.size_of(folder)
    assert (size.layers, size.hidden_size, size.vocab_size) == (2, 48, VOCABULARY)


def test_shapes_from_the_config_alone(tmp_path):
    folder = write_baichuan(tmp_path / "model", "13b")
    expected = {name: tuple(tensor.shape) for name, tensor in weights_of("13b").items()}
    assert shapes.of_config(folder) == expected


def test_the_content_hash_covers_bin_files_where_they_are_the_weights(tmp_path):
    folder = write_baichuan(tmp_path / "bin", "7b")
    other = write_baichuan(tmp_path / "other", "7b", seed=1)
    assert content_hash(folder) != content_hash(other)
    for path in other.glob("*.bin"):
        shutil.copy(folder / path.name, path)
    assert content_hash(folder) == content_hash(other)
    (other / "pytorch_model.bin.index.json").write_text("{}")
    assert content_hash(folder) != content_hash(other)
    # beside safetensors they are not read
    both = write_baichuan(tmp_path / "both", "7b", weights="safetensors")
    before = content_hash(both)
    shutil.copy(folder / "pytorch_model-00001-of-00002.bin", both / "pytorch_model.bin")
    assert content_hash(both) == before
    # the folder's code does not count
    (folder / "modeling_baichuan.py").write_text("")
    (other / "pytorch_model.bin.index.json").write_text((folder / "pytorch_model.bin.index.json").read_text())
    assert content_hash(folder) == content_hash(other)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_a_missing_shard_is_named(tmp_path, weights):
    folder = write_baichuan(tmp_path / "model", "7b", weights, 3)
    lost = next(folder.glob("*-00002-of-00003.*"))
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name} is missing"):
        shapes.of_model(folder)


def test_a_broken_index_is_named(tmp_path):
    folder = write_baichuan(tmp_path / "model", "7b")
    (folder / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(InputError, match=r"pytorch_model\.bin\.index\.json is not a sound index"):
        shapes.of_model(folder)


def test_a_folder_without_weights(tmp_path):
    folder = write_baichuan(tmp_path / "model", "7b")
    for path in folder.glob("*.bin"):
        path.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(InputError, match=r"no weights: no \*\.safetensors and no pytorch_model\*\.bin"):
        shapes.of_model(folder)


@pytest.mark.parametrize("weights, downloads", [("safetensors", 1), ("bin", 2)])
def test_bin_files_are_downloaded_only_where_there_is_nothing_else(tmp_path, monkeypatch, weights, downloads):
    published = write_baichuan(tmp_path / "published", "7b", weights, shards=1)
    if weights == "safetensors":
        (published / "pytorch_model.bin").write_bytes(b"the same weights again")
    asked = []

    def snapshot_download(name, revision, local_files_only=False, allow_patterns=()):
        if local_files_only:
            raise OSError("not in the cache")
        asked.append(allow_patterns)
        (tmp_path / "cache").mkdir(exist_ok=True)
        for path in published.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = resolve(Model(name="baichuan7b", path="baichuan-inc/Baichuan-7B", source="hub"), download=True)
    assert len(asked) == downloads
    there = {path.name for path in folder.iterdir()}
    assert ("pytorch_model.bin" in there) == (weights == "bin")
    assert {"config.json", "tokenizer.model", "tokenizer_config.json"} <= there
    assert not any(name.endswith(".py") for name in there)


# ---------------------------------------------------------------- files of torch.save


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def test_a_file_that_names_code_is_refused_and_the_code_not_run(tmp_path):
    torch.save({"weight": torch.zeros(2), "trap": Call(os.mkdir, str(tmp_path / "run"))}, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"a\.bin is not a sound file of weights: it asks for \w+\.mkdir,"):
        torchfile.header(tmp_path / "a.bin")
    folder = write_baichuan(tmp_path / "model", "7b", shards=1)
    state = dict(weights_of("7b")) | {"trap": Call(os.mkdir, str(tmp_path / "run"))}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not a sound file of weights: it asks for"):
        load(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_every_kind_of_tensor_has_its_shape(tmp_path, dtype):
    shared = torch.zeros(4, 6).to(dtype)
    state = {
        "a": torch.zeros(3, 2).to(dtype),
        "scalar": torch.zeros(()).to(dtype),
        "row": shared[1],
        "all": shared,
    }
    state["turned"] = shared.T
    torch.save(state, tmp_path / "a.bin")
    expected = {"a": (3, 2), "scalar": (), "row": (6,), "all": (4, 6), "turned": (6, 4)}
    assert torchfile.header(tmp_path / "a.bin") == expected


def test_a_state_dict_of_a_module_is_read(tmp_path):
    """With its metadata, and parameters that torch.save did not turn into tensors."""
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "a.bin")
    assert torchfile.header(tmp_path / "a.bin") == {"weight": (2, 3), "bias": (2,)}
    torch.save(dict(module.named_parameters()), tmp_path / "b.bin")
    assert torchfile.header(tmp_path / "b.bin") == {"weight": (2, 3), "bias": (2,)}


def test_the_old_format_says_how_to_convert(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before torch 1\.6.*torch\.save\(torch\.load\("):
        torchfile.header(tmp_path / "a.bin")


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2000)}, tmp_path / "a.bin")
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="it is cut off"):
        torchfile.header(tmp_path / "a.bin")


def test_a_storage_of_another_size_than_its_tensor_is_refused(tmp_path):
    torch.save({"a": torch.zeros(20)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as whole, zipfile.ZipFile(tmp_path / "b.bin", "w") as short:
        for name in whole.namelist():
            content = whole.read(name)
            short.writestr(name, content[:40] if name.endswith("data/0") else content)
    with pytest.raises(
        InputError, match=r"b\.bin is not a sound file of weights: a has 40 bytes, needed are 80"
    ):
        torchfile.header(tmp_path / "b.bin")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is no zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is no zip archive"),
        (pickle.dumps({"a": 1}), "before torch 1.6"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, reason):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        torchfile.header(tmp_path / "a.bin")


@pytest.mark.parametrize("state", [[torch.zeros(2)], {"epoch": 3}, {"model": {"a": torch.zeros(2)}}])
def test_a_file_of_torch_that_holds_no_weights_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"a\.bin is not a sound file of weights"):
        torchfile.header(tmp_path / "a.bin")


def test_the_config_is_not_changed_by_reading_it(tmp_path):
    baichuan.register()
    folder = write_baichuan(tmp_path / "model", "13b")
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again.get("max_position_embeddings") is None and again.get("norm_head") is None
    assert AutoConfig.from_pretrained(tmp_path / "again").alibi
