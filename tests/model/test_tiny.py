"""The model built in code: what it is, that it is always the same, and that building it disturbs nobody."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.model import tiny


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_shape_is_as_documented(tiny_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    config = model.config
    assert config.model_type == "llama"
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 128, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (4, 2, 512)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # embeddings, twice (q and o 64 x 64, k and v 32 x 64, three 128 x 64, two norms), the last norm
    assert (
        sum(p.numel() for p in model.parameters())
        == 512 * 64 + 2 * (2 * 4096 + 2 * 2048 + 3 * 8192 + 128) + 64
    )


def test_pad_is_eos_as_in_smollm2(tiny_path):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(tiny_path), AutoConfig.from_pretrained(tiny_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (2, 2, 1)
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    "text", ["The food was great.", " 你好，世界 🙂", "a  b\n\tc", "naïve <b> 3.50 $", "é\u0301\x00"]
)
def test_any_text_comes_back(tiny_path, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # no BOS, no EOS, nothing unknown


def test_tokenizer_knows_the_language_of_the_reviews(tiny_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    text = "We went to the late screening and the second half"
    assert len(tokenizer(text).input_ids) < 0.6 * len(text)


def test_predictions_depend_on_the_text_and_are_neither_flat_nor_certain(tiny_path):
    """Near the uniform distribution, wrong masks and positions would go unseen in every test that uses it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    ids = torch.arange(100, 124).repeat(2, 1)
    ids[1, 0] = 300
    with torch.inference_mode():
        logprobs = model(ids).logits.log_softmax(-1)
    assert (logprobs[0, -1] - logprobs[1, -1]).abs().max() > 0.01  # 23 tokens later
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    assert entropy.min() > 3.0 and entropy.max() < 6.1  # uniform: log 512 = 6.24


_BUILD = """
import sys, torch
torch.manual_seed(int(sys.argv[1])); before = torch.get_rng_state()
from rlhf_exp.model.tiny import build_tiny
print(build_tiny(), torch.equal(before, torch.get_rng_state()))
"""


def test_every_build_is_the_same_and_leaves_the_random_state_alone(cache, tiny_path):
    # another seed, another order of hashing: nothing of it may show
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, "5"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    folder, state_is_as_before = done.stdout.split()
    assert state_is_as_before == "True"
    assert done.stderr == ""
    assert Path(folder) == cache / "models" / tiny_path.name
    assert _content(Path(folder)) == _content(tiny_path)
    assert len({path.stat().st_mode for path in Path(folder).iterdir()}) == 1


_RANK = """
import sys, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
from rlhf_exp.model.tiny import build_tiny
if sys.argv[3] == "1" and rank == 0:
    dist.barrier()
folder = build_tiny()
if sys.argv[3] == "1" and rank == 1:
    dist.barrier()
dist.barrier()
dist.destroy_process_group()
print(folder)
"""


@pytest.mark.parametrize("first", ["1", "any"])
def test_any_rank_may_build_it(cache, tiny_path, tmp_path, first):
    """Rank 1 before rank 0, and both at once: transformers itself lets rank 0 alone write weights."""
    meeting = str(tmp_path / "meeting")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), meeting, first], stdout=-1, stderr=-1, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(cache / "models" / tiny_path.name)}
    assert _content(cache / "models" / tiny_path.name) == _content(tiny_path)


def test_folder_is_of_the_recipe_and_the_text(cache, tiny_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "_save", lambda folder: None)
    names = {tiny_path.name}
    with monkeypatch.context() as patch:
        patch.setitem(tiny.RECIPE, "seed", 1)
        names.add(tiny.build_tiny().name)
    with monkeypatch.context() as patch:
        (tmp_path / "text").write_text(json.dumps({"opening": "another text"}))
        patch.setattr(tiny, "TEXT", tmp_path / "text")
        names.add(tiny.build_tiny().name)
    assert len(names) == 3
    assert all(name.startswith("tiny-") for name in names)


def _save_once(folder: Path) -> None:
    with open(os.environ["RLHF_EXP_CACHE"] + "/built", "a") as file:
        file.write("x")
    time.sleep(0.3)  # so that the others come meanwhile
    (folder / "config.json").write_text("{}")


def _build_and_look() -> None:
    assert (tiny.build_tiny() / "config.json").is_file()


def test_forked_workers_at_once_build_it_once(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(tiny, "_save", _save_once)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_and_look) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert (cache / "built").read_text() == "x"


def test_failed_build_leaves_no_folder(cache, monkeypatch):
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("half way")

    monkeypatch.setattr(tiny, "_save", fail)
    with pytest.raises(RuntimeError, match="half way"):
        tiny.build_tiny()
    assert [path.name for path in (cache / "models").iterdir()] == [".locks"]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot build the tiny model in .*file.*set RLHF_EXP_CACHE"):
        tiny.build_tiny()


def test_missing_text_says_so(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "TEXT", tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"missing: .*absent\.jsonl; reinstall"):
        tiny.build_tiny()
