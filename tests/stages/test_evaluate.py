"""Evaluation of policies that are known: the SFT adapter under two names, and another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.data.load import load_view
from rlhf_exp.model.roles import Roles
from rlhf_exp.schema import Evaluation, Generation, RewardSource
from rlhf_exp.stages import evaluate
from rlhf_exp.stages.context import Context
from rlhf_exp.store.runs import RunFolder
from rlhf_exp.tracking import NullTracker, read_lines, read_metrics

POLICIES = ["sft", "ppo@2", "ppo@3"]


@pytest.fixture(scope="module")
def evaluated(base, adapters, tmp_path_factory):
    """One evaluation, and all that was measured on the way: ppo@2 is the SFT adapter, ppo@3 another."""
    from rlhf_exp.schema import Dataset, EvalRun, Lora, Model, Views

    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(adapters["sft"], root / "ppo" / "checkpoints" / "step_00002")
    shutil.copytree(adapters["other"], root / "ppo" / "adapter")
    curve = [{"step": step, "objective/kl": 0.1 * step, "objective/scores": 0.0} for step in (1, 2, 3)]
    (root / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    folder = RunFolder(root / "run", "eval", "0" * 64)
    folder.start({})
    config = EvalRun(
        stage="eval",
        model=Model(name="tiny", source="builtin", lora_targets=["q_proj"]),
        lora=Lora(),
        dataset=Dataset(
            name="reviews", family="reviews", views=Views(*["builtin:reviews"] * 3), max_prompt_tokens=24
        ),
        eval=Evaluation(prompts=10, samples=3),
        generation=Generation(max_new_tokens=8),
    )
    parents = {"sft": adapters["sft"], "reward": adapters["reward"], "ppo": root / "ppo"}
    measured, measure = {}, evaluate.measure

    def remember(*arguments):
        result = measure(*arguments)
        measured[result.candidate.name] = result
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "measure", remember)
        patch.setattr(evaluate, "ROWS", 4)  # several batches
        metrics = evaluate.run(config, Context(base, folder, NullTracker(), parents))
    content = json.loads((folder.path / "eval.json").read_text())
    return SimpleNamespace(
        path=folder.path, metrics=metrics, content=content, measured=measured, config=config, parents=parents
    )


def test_the_form_of_eval_json(evaluated):
    assert set(evaluated.content) == {"prompts", "evaluate_on", "policies", "samples", "data"}
    assert evaluated.content["evaluate_on"] == "heldout"
    assert [(p["name"], p["step"]) for p in evaluated.content["policies"]] == [
        ("sft", 0),
        ("ppo@2", 2),
        ("ppo@3", 3),
    ]
    wanted = {"reward", "gold", "kl", "length", "distinct_2", "empty_rate", "eos_rate"}
    for policy in evaluated.content["policies"]:
        assert wanted <= set(policy["metrics"])
    assert len(evaluated.content["samples"]) == 3
    for sample in evaluated.content["samples"]:
        assert list(sample["responses"]) == POLICIES
        for response in sample["responses"].values():
            assert set(response) == {"text", "ended", "reward", "gold"}


def test_prompts_are_held_out(evaluated):
    views = {
        split: {p.prompt for p in load_view(evaluated.config.dataset, "prompts", split)}
        for split in ("train", "validation", "heldout")
    }
    rows = list(read_lines(evaluated.path / "samples.jsonl"))
    shown = {row["prompt"] for row in rows}
    assert len(shown) == 10
    assert len(rows) == 30
    assert shown <= views["heldout"]
    assert not shown & (views["train"] | views["validation"])


def test_the_same_policy_gives_the_same_answers(evaluated):
    sft, same, other = (evaluated.measured[name] for name in POLICIES)
    assert sft.rollout.responses == same.rollout.responses
    assert sft.scores == same.scores
    assert {k: v for k, v in sft.metrics.items() if k != "kl"} == {
        k: v for k, v in same.metrics.items() if k != "kl"
    }
    assert sft.rollout.responses != other.rollout.responses
    # paired noise: policies that are close give many equal first tokens, and far fewer by chance (1 in 512)
    assert sft.metrics["kl"] == same.metrics["kl"] == 0


@pytest.fixture(scope="module")
def peft_model(base):
    """Plain transformers with PEFT's own adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(folder: Path):
        plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        return PeftModel.from_pretrained(plain, folder).eval()

    return load


def test_the_kl_is_that_of_the_whole_distributions(evaluated, adapters, peft_model):
    rollout = evaluated.measured["ppo@3"].rollout
    policy, sft = (peft_model(adapters[name]) for name in ("other", "sft"))
    total = 0.0
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([prompt + response])).logits[0, places] for m in (policy, sft))
        p, q = p.double().softmax(-1), q.double().softmax(-1)
        total += float((p * (p / q).log()).sum())
    expected = total / len(rollout.prompts)
    assert expected > 0.1
    assert evaluated.measured["ppo@3"].metrics["kl"] == pytest.approx(expected, abs=1e-4)
    assert evaluated.metrics["last/kl"] == evaluated.measured["ppo@3"].metrics["kl"]


def test_rewards_are_the_reward_models(evaluated, adapters, peft_model):
    model, head = peft_model(adapters["reward"]), load_file(adapters["reward"] / "head.safetensors")
    for name in POLICIES:
        measured = evaluated.measured[name]
        rollout, expected = measured.rollout, []
        for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
            with torch.no_grad():
                ids = torch.tensor([prompt + response])
                hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            expected.append(float(hidden @ head["weight"] + head["bias"]))
        assert measured.scores["reward"] == pytest.approx(expected, abs=1e-4)
        assert measured.metrics["reward"] == pytest.approx(sum(expected) / 10, abs=1e-4)


def test_gold_is_vaders(evaluated):
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    for name in POLICIES:
        measured = evaluated.measured[name]
        expected = [
            analyser.polarity_scores(text)["compound"] if text.strip() else 0 for text in measured.texts
        ]
        assert measured.scores["gold"] == expected
        assert measured.metrics["gold"] == pytest.approx(sum(expected) / 10)


def test_lengths_and_ends(evaluated, base, context, replaced, monkeypatch):
    """With an EOS that the SFT policy draws: answers end there, and it does not count as a token of the answer."""
    config = replaced(evaluated.config, "generation", min_new_tokens=0)
    given = context(**evaluated.parents)
    prompts = sorted(load_view(config.dataset, "prompts", "heldout"), key=lambda prompt: prompt.id)[:10]
    encoded = evaluated.measured["sft"].rollout.prompts
    sft = evaluate.candidates(config, given)[0]

    def measure() -> evaluate.Measured:
        with Roles(base) as roles:
            head = evaluate.load_scorer(config, given, roles)
            return evaluate.measure(config, given, roles, head, sft, prompts, encoded)

    monkeypatch.setattr(type(base), "eos_id", property(lambda _: -1))  # never drawn
    free = measure().rollout.responses
    assert {len(response) for response in free} == {8}
    eos = free[0][3]
    monkeypatch.setattr(type(base), "eos_id", property(lambda _: eos))
    metrics = measure().metrics
    lengths = [r.index(eos) if eos in r else len(r) for r in free]
    assert lengths[0] <= 3
    assert metrics["length"] == pytest.approx(sum(lengths) / 10)
    assert metrics["eos_rate"] == sum(eos in r for r in free) / 10 > 0


def test_the_curve_and_the_report(evaluated):
    lines = read_metrics(evaluated.path / "metrics.jsonl")
    assert [(line["step"], line["policy_step"]) for line in lines] == [(1, 0), (2, 2), (3, 3)]
    page = (evaluated.path / "report" / "report.html").read_text()
    assert all(name in page for name in POLICIES)


def test_the_base_against_itself_and_as_before(
    base, evaluated, context, fingerprint, unchanged, replaced, monkeypatch
):
    """Without SFT the plain base is the first policy and the reference; a rule scores; nothing is left behind."""
    from dataclasses import replace

    config = replace(
        replaced(evaluated.config, "eval", prompts=2, samples=0, gold="none"),
        reward_source=RewardSource(kind="function", function="length"),
    )
    before = fingerprint(base)
    given = context(ppo=evaluated.parents["ppo"] / "adapter")
    evaluate.run(config, given)
    unchanged(base, before)
    content = json.loads((given.folder.path / "eval.json").read_text())
    assert content["policies"][0]["name"] == "base"
    first, last = (policy["metrics"] for policy in content["policies"])
    assert first["kl"] == 0
    assert last["kl"] > 0
    assert "gold" not in first
    assert content["samples"] == []


@pytest.fixture
def measure_sft(base, evaluated, context, replaced):
    """measure_sft(**values of eval) -> Measured of the SFT policy on ten prompts, scored by their letters."""
    from dataclasses import replace

    def measure(**values) -> evaluate.Measured:
        config = replace(
            replaced(evaluated.config, "eval", gold="regex:e", **values),
            reward_source=RewardSource(kind="function", function="regex:a"),
        )
        given = context(**evaluated.parents)
        prompts = sorted(load_view(config.dataset, "prompts", "heldout"), key=lambda prompt: prompt.id)[:10]
        encoded = evaluated.measured["sft"].rollout.prompts
        with Roles(base) as roles:
            sft = evaluate.candidates(config, given)[0]
            return evaluate.measure(config, given, roles, None, sft, prompts, encoded)

    return measure


def test_several_answers_a_prompt(base, evaluated, measure_sft):
    """The first of each prompt are those of a single answer; errors are of the prompts' means."""
    measured = measure_sft(samples_per_prompt=3)
    prompts = evaluated.measured["sft"].rollout.prompts
    assert measured.rollout.prompts == [prompt for prompt in prompts for _ in range(3)]
    answers = measured.rollout.responses
    assert answers[::3] == evaluated.measured["sft"].rollout.responses
    assert all(answers[i] != answers[i + 1] for i in range(0, 30, 3))
    found = [float("a" in text) for text in measured.texts]
    assert 0 < sum(found) < 30
    assert measured.scores["reward"] == found
    means = [sum(found[i : i + 3]) / 3 for i in range(0, 30, 3)]
    assert measured.means["reward"] == pytest.approx(means)
    center = sum(means) / 10
    assert measured.metrics["reward"] == pytest.approx(center)
    spread = (sum((mean - center) ** 2 for mean in means) / 9 / 10) ** 0.5
    assert measured.metrics["reward_se"] == pytest.approx(spread)
    assert measured.metrics["length"] == pytest.approx(
        sum(len(answer) - (base.eos_id in answer) for answer in answers) / 30
    )
    # what is shown of a prompt is its first answer, with that answer's score
    shown = evaluate.answer(measured, 4)
    assert (shown["text"], shown["reward"]) == (measured.texts[12], found[12])
    assert measured.greedy == [] and "greedy" not in shown and "greedy_reward" not in measured.metrics


def test_greedy_answers_are_the_most_probable_tokens(base, evaluated, measure_sft, adapters, peft_model):
    measured = measure_sft(greedy=True, samples_per_prompt=2)
    model, expected = peft_model(adapters["sft"]), []
    for prompt in evaluated.measured["sft"].rollout.prompts:
        ids = list(prompt)
        for position in range(8):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            if position == 0:
                logits[base.eos_id] = -torch.inf  # min_new_tokens=1
            ids.append(int(logits.argmax()))
            if ids[-1] == base.eos_id:
                break
        expected.append(base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert measured.greedy == expected
    assert measured.metrics["greedy_gold"] == sum("e" in text for text in expected) / 10
    assert evaluate.answer(measured, 3)["greedy"] == expected[3]
    assert measured.texts != expected
