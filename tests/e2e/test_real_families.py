"""sft and reward for a few steps on the real rows of every family, with the tiny model."""

from __future__ import annotations

import json
import math

import pytest

from tests.e2e.conftest import call, runs

# dataset option -> folder of each view, in the order demonstrations, comparisons
FOLDERS = {
    "hc3_zh": ("hc3_zh", None),
    "hc3_en": ("hc3_en", None),
    "rlhf_reward_en": ("rlhf_reward_en", "rlhf_reward_en"),
    "rlhf_reward_zh": ("rlhf_reward_single_round_zh", "rlhf_reward_single_round_zh"),
    "hh_rlhf_zh": ("hh_rlhf_helpful_zh", "hh_rlhf_helpful_zh"),
    "tldr": ("openai_summarize_tldr", "openai_summarize_comparisons"),
    "tldr_openai": ("tldr_3_filtered", "summarize_comparisons_raw"),
    "alpaca_en": ("alpaca_en", None),
    "alpaca_zh": ("alpaca_zh", None),
    "dpo_en": ("dpo_en", "dpo_en"),
    "dpo_zh": ("dpo_zh", "dpo_zh"),
    "dpo_zh_medicalgpt": ("dpo_zh_medicalgpt", "dpo_zh_medicalgpt"),
    "sst2": ("sst2", None),
    "imdb": ("imdb_prompts", None),
}
VIEW = {"sft": "demonstrations", "reward": "comparisons"}
CASES = [
    (stage, dataset, folder)
    for dataset, folders in FOLDERS.items()
    for stage, folder in zip(VIEW, folders, strict=True)
    if folder
]


@pytest.mark.parametrize(("stage", "dataset", "folder"), CASES)
def test_a_few_steps_on_real_rows(shared_data, tmp_path, stage, dataset, folder):
    """The dataset's own template and lengths; training rows are few, what is evaluated on is not."""
    result = call(
        f"stage={stage}",
        "model=tiny",
        "model.dtype=float32",
        "threads=1",
        "tracking=none",
        f"dataset={dataset}",
        f"dataset.views.{VIEW[stage]}={shared_data / folder}",
        "dataset.limit=8",
        "dataset.max_prompt_tokens=128",
        "dataset.max_response_tokens=64",
        "dataset.validation_share=0.03",
        "train.steps=2",
        "train.batch_size=4",
        "train.micro_batch_size=4",
        f"output_dir={tmp_path}",
    )
    assert result.code == 0, result.err
    (run,) = runs(tmp_path, stage)
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    assert all(value is not None and math.isfinite(value) for value in metrics.values())
    assert metrics[f"data/{VIEW[stage]}/rows"] > 100
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert f"{VIEW[stage]}: " in result.out and "prompt tokens: median" in result.out
    if stage == "reward":
        assert "the longer answer is the chosen one in" in result.out
        assert (
            metrics["validation/accuracy_low"]
            <= metrics["validation/accuracy"]
            <= metrics["validation/accuracy_high"]
        )


def test_every_dataset_of_the_tree_is_here():
    from rlhf_exp.paths import conf_dir

    there = {path.stem for path in (conf_dir() / "dataset").glob("*.yaml")}
    # no real rows: hh_rlhf has its family's Chinese set, jsonl any file; reviews and randomwalks are in the package
    assert there - set(FOLDERS) == {"hh_rlhf", "jsonl", "reviews", "randomwalks"}
