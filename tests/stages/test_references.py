"""Scores of human references: once each, as the reward model was trained, and never missing."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.schema import Dataset, Template, Views
from rlhf_exp.stages import ppo, references
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.references import References
from rlhf_exp.tracking import read_lines, read_metrics
from tests.stages.plain import (
    REFERENCES,
    SCORES,
    iterate,
)


def test_a_reference_is_scored_once_as_the_reward_model_was_trained(
    base, adapters, context, ppo_config, monkeypatch
):
    config = ppo_config({"score_scaling": "reference"})
    asked = []
    sound = references.score
    monkeypatch.setattr(
        references,
        "score",
        lambda *arguments, **more: asked.append(arguments[3:5]) or sound(*arguments, **more),
    )
    prompts = [SimpleNamespace(id=i, reference=f"fine {i}") for i in (7, 8, 7)]
    encoded = [[5, 6], [8], [5, 6]]
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        known = References(config)
        first = known.scores(actors, prompts, encoded)
        again = known.scores(actors, prompts[::-1], encoded[::-1])
        # oracle: one sequence at a time, prompt + " fine 7" + EOS, the last token
        head = load_file(adapters["reward"] / "head.safetensors")
        expected = []
        for prompt, ids in zip(prompts, encoded, strict=True):
            answer = base.tokenizer(f" {prompt.reference}", add_special_tokens=False)["input_ids"]
            with roles.use("reward"), torch.no_grad():
                sequence = torch.tensor([[*ids, *answer, base.eos_id]])
                hidden = base.model(sequence, output_hidden_states=True).hidden_states[-1]
            expected.append(float(hidden[0, -1] @ head["weight"] + head["bias"]))
    assert [len(rows) for rows, _ in asked] == [2]
    assert first == pytest.approx(expected, abs=1e-5)
    assert again == first[::-1]
    assert first[0] != first[1]


def test_score_minus_ref_is_reported_and_paid(base, adapters, context, ppo_config, monkeypatch):
    config = ppo_config({"score_scaling": "reference", "whiten_advantages": False, "kl_coef": 0.0})
    monkeypatch.setattr(references, "score", lambda *_, **__: REFERENCES.tolist())
    monkeypatch.setattr(ppo, "score", lambda *_, **__: SCORES.tolist())
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        metrics = iterate(config, actors)
    assert metrics["objective/score_minus_ref"] == pytest.approx(float((SCORES - REFERENCES).mean()))
    assert metrics["objective/scores"] == pytest.approx(float(SCORES.mean()))


def test_a_reference_that_scored_nan_is_asked_again(base, adapters, context, ppo_config, monkeypatch):
    config, given = ppo_config({"score_scaling": "reference"}), [[math.nan, 0.5], [0.25]]
    monkeypatch.setattr(references, "score", lambda *arguments, **more: given.pop(0))
    prompts = [SimpleNamespace(id=i, reference="fine") for i in (7, 8)]
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        known = References(config)
        assert math.isnan(known.scores(actors, prompts, [[5], [6]])[0])
        assert known.scores(actors, prompts, [[5], [6]]) == [0.25, 0.5]


def test_prompts_without_references_are_refused(ppo_config):
    config = ppo_config({"score_scaling": "reference"})
    with pytest.raises(
        InputError, match=r"ppo\.score_scaling=reference .* training prompts of dataset reviews"
    ):
        references.require(config)
    references.require(ppo_config({"score_scaling": "running"}))


def test_references_are_asked_for_before_anything_is_trained(cli_words, call):
    """By preflight: the SFT and reward stages below would else be trained first."""
    code, err = call(*cli_words, "ppo.score_scaling=reference")
    assert code == 2
    assert "ppo.score_scaling=reference" in err


@pytest.fixture
def cli_words(tmp_path) -> list[str]:
    return ["stage=ppo", "model=tiny", "tracking=none", f"output_dir={tmp_path / 'out'}", "dry_run=true"]


@pytest.fixture
def call(capsys):
    from rlhf_exp import cli

    def run(*words: str) -> tuple[int, str]:
        code = cli.main(list(words))
        return code, capsys.readouterr().err

    return run


def test_a_run_on_real_summaries(shared_data, context, ppo_config):
    """score_minus_ref of a rule is what the rule says of answer and human summary, from the files alone."""
    folder = str(shared_data / "openai_summarize_tldr")
    config = ppo_config(
        {"score_scaling": "reference", "steps": 2, "batch_size": 4},
        reward_source={"kind": "function", "function": "length"},
    )
    config.dataset = Dataset(
        name="tldr",
        family="tldr",
        views=Views(folder, None, folder),
        template=Template(truncate="tldr"),
        max_prompt_tokens=64,
        max_response_tokens=400,  # the tiny tokenizer has few words: no summary is cut
        limit=4,
    )
    given = context()
    ppo.run(config, given)
    lines = read_metrics(given.folder.path / "metrics.jsonl")
    samples = list(read_lines(given.folder.path / "samples.jsonl"))
    rows = map(json.loads, (shared_data / "openai_summarize_tldr" / "train.jsonl").open())
    labels = {row["prompt"].strip(): row["label"].strip() for row in rows}
    for line in lines:
        of_step = [row for row in samples if row["step"] == line["step"]]
        assert len(of_step) == 4
        words = [len(re.findall(r"\S*\w\S*", labels[row["prompt"]])) for row in of_step]
        expected = sum(row["score"] for row in of_step) / 4 - sum(words) / 4
        assert line["objective/score_minus_ref"] == pytest.approx(expected, abs=1e-4)
