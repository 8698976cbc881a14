"""Held-out prompts that another stage trains on, and what the tokenizer alone can tell, before anything trains."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import call

EVAL = ("stage=eval", "model=tiny", "tracking=none", "dry_run=true", "reward_source=length")


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (("dataset.heldout_share=0.4", "upstream.sft={dataset: reviews}"), "sft"),
        (("upstream.sft={dataset.heldout_share: 0}",), "sft"),
        (("upstream.ppo={dataset.validation_share: 0, dataset.heldout_share: 0.1}",), "ppo"),
    ],
)
def test_what_was_trained_on_is_not_evaluated_on(tmp_path, words, stage):
    result = call(*EVAL, *words, f"output_dir={tmp_path}")
    assert result.code == 2
    assert any(
        f"held-out prompts of eval are training prompts of {stage}: give both" in e for e in result.errors
    )


@pytest.mark.parametrize("words", [(), ("upstream.sft={dataset.heldout_share: 0.3}",), ("dataset.limit=9",)])
def test_stages_that_cannot_meet(tmp_path, words):
    result = call(*EVAL, *words, f"output_dir={tmp_path}")
    assert result.code == 0, result.err


def test_the_tail_of_hc3s_questions_does_not_tell_two_prompts_apart(tmp_path):
    rows = [
        {
            "question": f"Why {i} ? Please explain like I'm five.",
            "human_answers": ["h"],
            "chatgpt_answers": ["c"],
        }
        for i in range(60)
    ]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "all.jsonl"
    words = ("dataset=hc3_en", f"dataset.views.demonstrations={place}", f"dataset.views.prompts={place}")
    result = call(
        *EVAL, *words, "upstream.sft={dataset.hc3.strip_eli5: true}", f"output_dir={tmp_path / 'out'}"
    )
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("dataset/template=chat",), "the model's tokenizer has no chat template"),
        (("dataset/template=alpaca", "dataset.max_prompt_tokens=20"), "leaves no room for the prompt"),
        (("model.eos_token=nope",), "model.eos_token='nope' is not one token"),
    ],
)
def test_templates_are_tried_before_anything_trains(tmp_path, words, problem):
    result = call(
        "stage=sft", "model=tiny", "tracking=none", "dry_run=true", *words, f"output_dir={tmp_path}"
    )
    assert result.code == 2 and len(result.errors) == 1 and problem in result.err


def test_an_adapter_that_the_stage_does_not_use(tmp_path):
    result = call("stage=reward", "model=tiny", "adapters.sft=base", "dry_run=true", f"output_dir={tmp_path}")
    assert result.errors == [
        "error: adapters.sft is for stages that stand on sft, which reward does not: leave it out"
    ]


def test_a_pinned_seed_of_sft_draws_the_same_weights_for_every_seed_above(tmp_path):
    words = (
        "model=tiny",
        "model.from_scratch=true",
        "dry_run=true",
        "tracking=none",
        f"output_dir={tmp_path}",
    )
    keys = set()
    for seed in (0, 1):
        result = call("stage=ppo", f"seed={seed}", "upstream.sft={lora: full, seed: 7}", *words)
        assert result.code == 0, result.err
        keys |= {line for line in result.out.splitlines() if line.startswith("stage    sft")}
    assert keys == {
        line
        for line in call("stage=sft", "lora=full", "seed=7", *words).out.splitlines()
        if line.startswith("stage    sft")
    }
    assert len(keys) == 1
