"""SmolLM2-135M, and the real TL;DR rows: does PPO start where SFT ended, and does it all run through?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from peft import PeftModel

SHORT = (
    "threads=1",
    "tracking=none",
    "ppo.steps=2",
    "ppo.batch_size=4",
    "ppo.micro_batch_size=2",
    "ppo.epochs=2",
    "generation.max_new_tokens=6",
    "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}, dataset: {limit: 8}}",
    "upstream.reward={train: {steps: 2, batch_size: 4, micro_batch_size: 4}, dataset: {limit: 8}}",
)
TLDR = ("dataset=tldr", "dataset.max_prompt_tokens=96", "dataset.max_response_tokens=24")


def finite(folder: Path, cli, steps: int) -> list[dict]:
    found = cli.lines(folder / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    for line in found:
        assert all(math.isfinite(value) for value in line.values()), line
    return found


def started(metrics: dict, tolerance: float) -> None:
    """Before the first update policy and reference agree, and the scoring forward with the sampler's."""
    assert metrics["objective/kl_max"] <= tolerance
    assert abs(metrics["first/ratio_max"] - 1) <= tolerance
    assert metrics["first/approxkl"] <= tolerance


# ---------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def real(cli, smollm2_path, tmp_path_factory):
    """stage=ppo from nothing, a few steps of each stage, in bfloat16."""
    output = tmp_path_factory.mktemp("real") / "outputs"
    words = ("stage=ppo", "model=smollm2_135m", "model.dtype=bfloat16", *SHORT, f"output_dir={output}")
    result = cli.call(*words)
    assert result.code == 0, result.out + result.err
    return output


def test_the_real_model_in_bfloat16(real, cli):
    (ppo,), (sft,), (reward,) = (cli.runs(real, stage) for stage in ("ppo", "sft", "reward"))
    metrics = finite(ppo, cli, 2)
    started(metrics[0], 0.05)
    assert metrics[0]["rollout/logprob_difference"] < 0.5  # cached decoding against a whole forward, in bf16
    assert metrics[0]["policy/ratio_max"] > 1  # the second epoch has moved
    assert metrics[0]["policy/grad_norm"] > 0
    finite(sft, cli, 2)
    finite(reward, cli, 2)
    record = json.loads((ppo / "run.json").read_text())
    assert record["inputs"]["base"]["dtype"] == "bfloat16"


def test_the_real_model_in_float32_starts_exactly(real, cli, tmp_path):
    (sft,), (reward,) = (cli.runs(real, stage) for stage in ("sft", "reward"))
    given = [f"adapters.sft={sft}", f"adapters.reward={reward}", "ppo.steps=1", "ppo.critic=own"]
    words = [word for word in SHORT if not word.startswith(("upstream.", "ppo.steps"))]
    output = tmp_path / "out"
    result = cli.call(
        "stage=ppo", "model=smollm2_135m", "model.dtype=float32", *words, *given, f"output_dir={output}"
    )
    assert result.code == 0, result.err
    (ppo,) = cli.runs(output, "ppo")
    (metrics,) = finite(ppo, cli, 1)
    started(metrics, 0.0)
    # the value head is of no use without the adapter whose hidden states it reads
    kept, start = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (ppo / "critic", reward / "adapter")
    )
    assert len(kept) == len(start) and kept != start
    assert metrics["rollout/logprob_difference"] < 1e-3


def test_peft_reads_the_real_adapter(real, cli, smollm2_path):
    from transformers import AutoModelForCausalLM

    (ppo,) = cli.runs(real, "ppo")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2_path), ppo / "adapter")
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 30 * 7  # layers x modules
    assert all(p.abs().max() > 0 for p in trained)


# ---------------------------------------------------------------- TL;DR


def check_tldr(output: Path, cli, steps: int) -> None:
    (ppo,) = cli.runs(output, "ppo")
    finite(ppo, cli, steps)
    samples = cli.lines(ppo / "samples.jsonl")
    assert all(row["prompt"].startswith("SUBREDDIT: r/") for row in samples)
    assert all(row["prompt"].rstrip().endswith("TL;DR:") for row in samples)
    for stage in ("sft", "reward", "ppo"):
        (folder,) = cli.runs(output, stage)
        assert json.loads((folder / "run.json").read_text())["status"] == "FINISHED"
    reward = json.loads((cli.runs(output, "reward")[0] / "run.json").read_text())["metrics"]
    assert 0 < reward["data/comparisons/longer_chosen"] < 1


def test_tldr_on_the_tiny_model(cli, shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_EXP_DATA", str(shared_data))
    result = cli.call("stage=ppo", "model=tiny", *TLDR, *SHORT, f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    check_tldr(tmp_path / "out", cli, 2)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_tldr_on_the_real_model(cli, smollm2_path, shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_EXP_DATA", str(shared_data))
    words = (
        "stage=ppo",
        "model=smollm2_135m",
        *TLDR,
        *SHORT,
        "ppo.steps=3",
        f"output_dir={tmp_path / 'out'}",
    )
    result = cli.call(*words)
    assert result.code == 0, result.err
    check_tldr(tmp_path / "out", cli, 3)
