"""stage=export from the command line, and what its cards say to type, typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

FORMS = ("merged", "adapter")
# prompt, answer: of different lengths
PAIRS = [
    ("The soup", "was cold and sad."),
    ("The staff at the new place", "were kind."),
    ("The soup", "was good."),
]


@pytest.fixture(scope="module")
def exported(cli, smoke, tmp_path_factory):
    """role, form -> the folder of the files, of the smoke experiment's adapters."""
    output, found = tmp_path_factory.mktemp("exports") / "outputs", {}

    def make(role: str, form: str) -> Path:
        if (role, form) not in found:
            words = ("stage=export", f"export.role={role}", f"export.form={form}", "model=tiny", "threads=1")
            words += ("model.dtype=float32", "tracking=none", f"output_dir={output / role / form}")
            result = cli.call(*words, f"adapters.{role}={smoke.folder(role)}")
            assert result.code == 0, result.err
            (run,) = cli.runs(output / role / form, "export")
            assert str(run / "export") in result.out or "files " in result.out
            found[role, form] = run / "export"
        return found[role, form]

    return make


def snippet(folder: Path) -> str:
    """The card's Python, to be run beside it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def ours(run: Path, base: str) -> list[float]:
    """The scores of PAIRS by PEFT's adapter and the head's file, one at a time, nothing padded."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, run / "adapter").eval()
    head, found = load_file(run / "head" / "head.safetensors"), []
    for prompt, answer in PAIRS:
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        found.append(float(hidden[0, -1] @ head["weight"] + head["bias"]))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_reward_model_scores_as_here_but_for_the_constant(exported, smoke, tiny_path, form, monkeypatch):
    folder = exported("reward", form)
    monkeypatch.chdir(folder)
    code = snippet(folder).replace(
        '("a prompt", "an answer"), ("a prompt", "another, longer answer")', repr(PAIRS)[1:-1]
    )
    names: dict = {}
    exec(code, names)
    constant = json.loads((folder / "export.json").read_text())["constant"]
    assert str(constant) in (folder / "README.md").read_text()
    expected = ours(smoke.folder("reward"), str(tiny_path))
    assert names["tokenizer"].pad_token_id != names["tokenizer"].eos_token_id
    assert (names["scores"].detach() + constant).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    assert isinstance(names["model"], PeftModel) == (form == "adapter")


@pytest.mark.parametrize("role", ["sft", "ppo"])
def test_a_policy_says_what_it_says_here(exported, smoke, tiny_path, role, monkeypatch, capsys):
    """Both forms, their generate() included, against PEFT on the run's own adapter."""
    ids = torch.tensor([[300, 301, 302]])
    plain = AutoModelForCausalLM.from_pretrained(tiny_path)
    theirs = PeftModel.from_pretrained(plain, smoke.folder(role) / "adapter").eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(tiny_path)(input_ids=ids).logits
    assert (expected - start).abs().max() > 1e-3
    for form in FORMS:
        folder = exported(role, form)
        monkeypatch.chdir(folder)
        names: dict = {}
        exec(snippet(folder), names)
        assert capsys.readouterr().out
        with torch.no_grad():
            found = names["model"](input_ids=ids).logits
        assert (found - expected).abs().max() < 1e-5


def test_merged_weights_are_pefts(exported, smoke, tiny_path):
    plain = AutoModelForCausalLM.from_pretrained(tiny_path)
    theirs = PeftModel.from_pretrained(plain, smoke.folder("ppo") / "adapter").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(exported("ppo", "merged")).state_dict()
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (found[name] - value).abs().max() < 1e-6, name


def test_the_card_says_where_it_comes_from(exported, smoke, cli):
    folder = exported("reward", "adapter")
    text = (folder / "README.md").read_text()
    record = json.loads((smoke.folder("reward") / "run.json").read_text())
    assert record["key"] in text
    assert f"{record['metrics']['validation/accuracy']:.4g}" in text
    assert "library_name: peft" in text and "reward-model" in text
    assert "LoRA: rank 16" in text


def test_what_is_missing_is_trained_first(cli, tmp_path):
    words = ("stage=export", "export.role=sft", "model=tiny", "threads=1", "tracking=none")
    result = cli.call(
        *words,
        "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}",
        f"output_dir={tmp_path}/out",
    )
    assert result.code == 0, result.err
    assert len(cli.runs(tmp_path / "out", "sft")) == len(cli.runs(tmp_path / "out", "export")) == 1


def test_all_weights_of_sft(cli, tmp_path):
    words = (
        "stage=export",
        "export.role=sft",
        "model=tiny",
        "threads=1",
        "tracking=none",
        "model.dtype=float32",
    )
    words += ("upstream.sft={lora: full, train: {steps: 2, batch_size: 4, micro_batch_size: 4}}",)
    output = f"output_dir={tmp_path}/out"
    result = cli.call(*words, output)
    assert result.code == 0, result.err
    (sft,), (run,) = cli.runs(tmp_path / "out", "sft"), cli.runs(tmp_path / "out", "export")
    found, theirs = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (run / "export", sft / "model")
    )
    assert all(torch.equal(found[name], value) for name, value in theirs.items())
    refused = cli.call(*words, output, "export.form=adapter")
    assert refused.code == 2
    (line,) = refused.errors
    assert "has no adapter" in line and "export.form=merged" in line


def test_bad_input_is_one_line(cli, smoke, nothing_loads):
    refused = cli.call(
        "stage=export", "model=tiny", "tracking=none", "adapters.sft=nowhere", "export.role=sft"
    )
    assert refused.code == 2 and "nowhere" in refused.errors[0]
    refused = cli.call("stage=export", "model=tiny", "export.role=gold")
    assert refused.code == 2 and "export.role must be one of sft, ppo, reward" in refused.errors[0]


# ---------------------------------------------------------------- the real model


def test_the_real_reward_model(cli, smollm2_path, tmp_path, monkeypatch):
    """SmolLM2-135M in float32: trained for a step, exported, loaded: the same scores."""
    output = tmp_path / "out"
    words = ("stage=export", "export.role=reward", "model=smollm2_135m", "model.dtype=float32", "threads=1")
    words += ("tracking=none", f"output_dir={output}")
    reward = "upstream.reward={train: {steps: 1, batch_size: 2, micro_batch_size: 2}, reward: {probes: 0}, "
    reward += "dataset: {limit: 4, validation_share: 0.01}}"
    for form in FORMS:
        result = cli.call(*words, reward, f"export.form={form}")
        assert result.code == 0, result.err
    (run,) = cli.runs(output, "reward")
    expected = ours(run, str(smollm2_path))
    for export in cli.runs(output, "export"):
        folder = export / "export"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.pad_token == "<|endoftext|>"  # EOS is <|im_end|>, as the model's own PAD was
        record = json.loads((folder / "export.json").read_text())
        if record["form"] == "merged":
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            plain = AutoModelForSequenceClassification.from_pretrained(
                smollm2_path, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
            )
            model = PeftModel.from_pretrained(plain, folder)
        rows = [
            [*tokenizer(p)["input_ids"], *tokenizer(f" {a}")["input_ids"], tokenizer.eos_token_id]
            for p, a in PAIRS
        ]
        with torch.no_grad():
            found = model.eval()(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
        assert (found + record["constant"]).tolist() == pytest.approx(expected, abs=1e-5)
