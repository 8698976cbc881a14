"""stage=dpo and stage=kto from the command line: what they stand on, who takes their adapters, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

COMMON = ("model=tiny", "dataset=reviews", "model.dtype=float32", "threads=1", "tracking=none")
SFT = "upstream.sft={train: {steps: 2, batch_size: 8, micro_batch_size: 8}}"
TRAIN = "train={steps: 3, batch_size: 8, micro_batch_size: 4}"


@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory):
    """dpo, then kto on the same SFT adapter: the output folder and both results."""
    output = tmp_path_factory.mktemp("direct") / "outputs"
    results = {
        stage: cli.call(f"stage={stage}", *COMMON, SFT, TRAIN, f"output_dir={output}")
        for stage in ("dpo", "kto")
    }
    return output, results


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_from_the_command_line(cli, trained):
    """sft is trained first, and reused by the other algorithm; a second time nothing is."""
    output, results = trained
    for stage, result in results.items():
        assert result.code == 0, result.err
        (folder,) = cli.runs(output, stage)
        found = record(folder)
        assert set(found["inputs"]["parents"]) == {"sft"}
        assert set(found["inputs"]["data"]) == {"comparisons"}
        accuracy = found["metrics"]["validation/accuracy"]
        assert found["metrics"]["validation/accuracy_low"] < accuracy
        assert f"validation accuracy {accuracy:.4g}" in result.out
        assert any(line.startswith("policy = base tiny + sft ") for line in result.out.splitlines())
        assert any(line.startswith("ref    = base tiny + sft ") for line in result.out.splitlines())
        lines = cli.lines(folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3]
        assert lines[0]["rewards/margins"] == 0.0
        again = cli.call(f"stage={stage}", *COMMON, SFT, TRAIN, f"output_dir={output}")
        assert again.code == 0 and f"stage    {stage}" in again.out
        assert len(cli.runs(output, stage)) == 1
    assert len(cli.runs(output, "sft")) == 1


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_eval_takes_the_run_folder_as_a_policy(cli, trained, tmp_path, stage):
    output, _ = trained
    (folder,) = cli.runs(output, stage)
    (sft,) = cli.runs(output, "sft")
    result = cli.call(
        *("stage=eval", *COMMON, f"adapters.sft={sft}", f"adapters.ppo={folder}"),
        *("reward_source=length", "eval={prompts: 4, gold: none, samples: 1}"),
        *("generation.max_new_tokens=6", f"output_dir={tmp_path / 'out'}"),
    )
    assert result.code == 0, result.err
    (run,) = cli.runs(tmp_path / "out", "eval")
    policies = json.loads((run / "eval.json").read_text())["policies"]
    assert len(policies) == 2
    assert policies[1]["metrics"]["kl"] > 0  # it has moved from the SFT adapter


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_export_writes_the_policy(cli, trained, stage):
    """By role, with the same settings: nothing is trained; the files compute as base and adapter do."""
    output, _ = trained
    (folder,) = cli.runs(output, stage)
    words = ("stage=export", f"export.role={stage}", *COMMON, SFT, f"output_dir={output}")
    result = cli.call(*words, f"upstream.{stage}={{{TRAIN.replace('=', ': ')}}}")
    assert result.code == 0, result.err
    assert len(cli.runs(output, stage)) == len(cli.runs(output, "sft")) == 1
    (files,) = (
        run / "export"
        for run in cli.runs(output, "export")
        if json.loads((run / "export" / "export.json").read_text())["role"] == stage
    )
    ids = torch.arange(5, 15)[None]
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(files, dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        expected = PeftModel.from_pretrained(plain, folder / "adapter").eval()(ids).logits
    assert torch.allclose(merged, expected, atol=1e-4)
    assert "comparisons" in (files / "README.md").read_text() or stage == "kto"


def test_a_given_adapter_is_exported_as_it_is(cli, trained, tmp_path):
    output, _ = trained
    (folder,) = cli.runs(output, "dpo")
    words = ("stage=export", "export={role: dpo, form: adapter}", *COMMON, f"adapters.dpo={folder}")
    result = cli.call(*words, f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    assert not cli.runs(tmp_path / "out", "dpo")
    (run,) = cli.runs(tmp_path / "out", "export")
    ours = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (run / "export" / "adapter_model.safetensors").read_bytes() == ours


def test_without_sft_the_base_is_the_reference(cli, tmp_path):
    words = ("stage=dpo", *COMMON, TRAIN, "adapters.sft=base", "dry_run=true")
    result = cli.call(*words, f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    assert "ref    = base tiny" in result.out.splitlines()
    assert "dpo: tiny, 0.000107 B parameters" in result.out
    roles = [line.split("│")[0].strip() for line in result.out.splitlines() if "│ parameters" in line]
    assert roles == ["base", "policy"]  # no adapter of the reference's: it is the base


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=kto", "train.batch_size=1"], "train.batch_size must be at least 2 pairs, got 1"),
        (["stage=dpo", "dpo.label_smoothing=0.5"], "dpo.label_smoothing must be less than 0.5, got 0.5"),
        (
            ["stage=dpo", "dpo={loss: ipo, label_smoothing: .1}"],
            "dpo.label_smoothing=0.1 is of dpo.loss=sigmoid",
        ),
        (["stage=dpo", "dpo.beta=0"], "dpo.beta must be more than 0, got 0.0"),
        (["stage=dpo", "dpo.loss=hinge"], "dpo.loss must be one of sigmoid, ipo, got hinge"),
        (["stage=kto", "kto.desirable_weight=0"], "kto.desirable_weight must be more than 0, got 0.0"),
        (["stage=dpo", "kto.beta=1"], "stage dpo has no key kto.beta; "),
        (
            ["stage=dpo", "dataset=imdb"],
            "dataset.views.comparisons is null: dataset imdb has no comparisons for dpo",
        ),
        (
            ["stage=kto", "dataset=imdb"],
            "dataset.views.comparisons is null: dataset imdb has no comparisons for kto",
        ),
        (["stage=dpo", "lora=full"], "lora.full is for sft, not for dpo"),
        (["stage=dpo", "train={batch_size: 8, micro_batch_size: 5}"], "train.micro_batch_size must divide"),
        (["stage=dpo", "adapters.reward=nowhere"], "adapters.reward is for stages that stand on reward"),
        (["stage=dpo", "adapters.sft=nowhere"], "adapters.sft=nowhere: there is no such folder"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_is_refused(cli, nothing_loads, tmp_path, words, message):
    cli.refuses(words, COMMON, message, tmp_path)
