"""Exported files read back by plain transformers and PEFT: weights, scores of padded batches, the PAD token."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
)

from rlhf_exp.model import export
from rlhf_exp.model.base import Base, load_base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.schema import Lora, Model
from tests.model.architectures import EOS, TABLE, VOCABULARY, conf, small_base

# one of each way to write a matrix, to name a trunk, to tie embeddings
NAMES = ["tiny", "gpt2", "opt350m", "opt1.3b", "bloom_560m", "gptj6b", "pythia_1b", "gemma3_270m", "glm4_9b"]


def write_tokenizer(folder: Path, special: dict[str, str], words: int = VOCABULARY) -> None:
    """w0 w1 w2 ..., of which `special` names some."""
    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", "w3")))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """name, special tokens -> a scaled-down model in a folder, as Base; EOS is w2."""
    found = {}

    def make(name: str, **special: str) -> Base:
        key = (name, *sorted(special.items()))
        if key not in found:
            folder = tmp_path_factory.mktemp("base") / name
            small_base(name).model.save_pretrained(folder)
            write_tokenizer(folder, {"eos_token": f"w{EOS}", **special})
            model = Model(name=name, path=str(folder), dtype="float32", lora_targets=conf(name).lora_targets)
            found[key] = load_base(model, "cpu")
        return found[key]

    return make


def role_on(base: Base, name: str, **lora) -> Roles:
    roles = Roles(base)
    roles.new("reward", lora_config(Lora(r=4, alpha=8.0, **lora), conf(name)), 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters("reward"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return roles


def texts() -> list[list[int]]:
    """Of different lengths; the model's own PAD and EOS are among them, in the middle and at the end."""
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (9, 2, 5)]
    return [[*rows[0], EOS], [*rows[1], EOS, 0, EOS], rows[2]]


def ours(roles: Roles, head: ScalarHead) -> torch.Tensor:
    """One at a time, the head at the last token, without its bias."""
    found = []
    for row in texts():
        with torch.no_grad():
            found.append(head(roles.trunk("reward", torch.tensor([row]))[0, -1]) - head.bias)
    return torch.stack(found)


def a_head(base: Base) -> ScalarHead:
    head = ScalarHead(base.hidden_size).reset(3)
    head.bias.data.fill_(0.7)
    return head


def scores(model, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    batch = tokenizer.pad({"input_ids": texts()}, return_tensors="pt")
    assert batch["input_ids"].shape == (3, 10)
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_merged_reward_model_scores_as_ours(base_of, tmp_path, name, dora):
    base = base_of(name, unk_token="w1")
    with role_on(base, name, dora=dora) as roles:
        head = a_head(base)
        export.write_merged(roles, "reward", tmp_path, torch.float32, head)
        expected = ours(roles, head)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_labels == 1
    assert (scores(model, tmp_path) - expected).abs().max() < 1e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_of_a_reward_model_scores_as_ours(base_of, tmp_path, name):
    base = base_of(name, unk_token="w1")
    with role_on(base, name) as roles:
        head = a_head(base)
        export.write_adapter(roles, "reward", tmp_path, "someone/base", head)
        expected = ours(roles, head)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(
        base.path, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(plain, tmp_path)
    assert (scores(model, tmp_path) - expected).abs().max() < 1e-5
    assert model.peft_config["default"].base_model_name_or_path == "someone/base"
    assert model.peft_config["default"].task_type == "SEQ_CLS"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_those_of_peft(base_of, tmp_path, name, dora):
    base = base_of(name)
    with role_on(base, name, dora=dora) as roles:
        roles.save("reward", tmp_path / "adapter")
        export.write_merged(roles, "reward", tmp_path / "merged", torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() < 1e-6, key
    start = AutoModelForCausalLM.from_pretrained(base.path).state_dict()
    assert sum(not torch.equal(start[key], value) for key, value in theirs.items()) >= 2
    # the tokenizer is the base's
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token is None


def test_the_base_is_left_as_it_was(base_of, tmp_path):
    base = base_of("tiny")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    config, special = base.model.config.to_dict(), base.tokenizer.special_tokens_map
    with role_on(base, "tiny") as roles:
        export.write_merged(roles, "reward", tmp_path, torch.bfloat16, a_head(base))
    assert base.model.config.to_dict() == config
    assert base.tokenizer.special_tokens_map == special
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_weights_are_rounded_once(base_of, tmp_path):
    base = base_of("tiny")
    with role_on(base, "tiny") as roles:
        exact = export.merged(roles, "reward", torch.float32)
        export.write_merged(roles, "reward", tmp_path, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        if name in exact:
            assert torch.equal(value, exact[name].bfloat16())


def test_the_plain_base_is_merged_with_nothing(base_of, tmp_path):
    base = base_of("gpt2")
    export.write_merged(Roles(base), None, tmp_path, torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in base.model.state_dict().items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("listed", [None, [2, 9]])
def test_answers_end_at_the_eos_that_was_trained(base_of, tmp_path, listed):
    """model.eos_token is of the tokenizer alone; transformers' generate reads the model's files."""
    base = copy.deepcopy(base_of("tiny"))
    ends = 7
    base.tokenizer.eos_token = f"w{ends}"
    place = shutil.copytree(base.path, tmp_path / "base")
    if listed is not None:
        GenerationConfig(eos_token_id=listed).save_pretrained(place)
    base = dataclasses.replace(base, path=place)
    export.write_merged(Roles(base), None, tmp_path / "out", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == ends
    given = [EOS] if listed is None else listed
    assert model.generation_config.eos_token_id == [ends, *given]

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e4).index_fill_(1, torch.tensor(ends), 0.0)

    answer = model.generate(
        torch.tensor([[4, 5]]), max_new_tokens=8, logits_processor=[Only()], do_sample=False
    )
    assert answer.tolist() == [[4, 5, ends]]


# ---------------------------------------------------------------- PAD


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "w5"}, "w5"),  # its own
        ({"pad_token": "w2", "unk_token": "w1"}, "w1"),  # PAD is EOS
        ({"pad_token": "w1", "bos_token": "w1", "unk_token": "w4"}, "w4"),  # PAD begins texts
        ({"unk_token": "w2"}, "<|pad|>"),  # GPT-2: one token for everything
        ({}, "<|pad|>"),
    ],
)
def test_the_pad_token(tmp_path, special, pad):
    write_tokenizer(tmp_path, {"eos_token": "w2", **special})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    number = export.add_pad(tokenizer)
    assert tokenizer.pad_token == pad
    assert number == tokenizer.pad_token_id == (VOCABULARY if pad == "<|pad|>" else int(pad[1:]))
    assert tokenizer.eos_token_id == 2


def test_a_token_that_is_kept_for_padding_comes_before_unk(tmp_path):
    write_tokenizer(tmp_path, {"eos_token": "w2", "unk_token": "w1"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<|reserved_special_token_0|>", "[PAD]"], special_tokens=True)
    export.add_pad(tokenizer)
    assert tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize("form", ["merged", "adapter"])
@pytest.mark.parametrize("name", ["gpt2", "tiny"])
def test_a_pad_that_the_model_has_no_row_for(base_of, tmp_path, name, form):
    base = base_of(name)  # no PAD, no UNK: all 97 ids are in use
    with role_on(base, name) as roles:
        head = a_head(base)
        expected = ours(roles, head)
        if form == "merged":
            export.write_merged(roles, "reward", tmp_path, torch.float32, head)
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
            assert model.get_input_embeddings().num_embeddings == VOCABULARY + 1
        else:
            export.write_adapter(roles, "reward", tmp_path, "base", head)
            plain = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1)
            plain.resize_token_embeddings(VOCABULARY + 1)
            plain.config.pad_token_id = VOCABULARY
            model = PeftModel.from_pretrained(plain, tmp_path)
    assert (scores(model, tmp_path) - expected).abs().max() < 1e-5


def test_what_transformers_has_classes_for():
    assert export.classifier("llama") and export.published("llama")
    assert not export.classifier("baichuan") and not export.published("baichuan")
    kinds = {small_base(name).model.config.model_type for name in TABLE}
    assert {kind for kind in kinds if not export.classifier(kind)} == {"internlm3"}  # in transformers 5.23
