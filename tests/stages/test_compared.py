"""Win rates of whole evaluations: by scores, by rules, by a model that reads both answers; and relevance."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from rlhf_exp.data.load import load_view
from rlhf_exp.rewards import relevance
from rlhf_exp.rewards.judge import Judge as LocalJudge
from rlhf_exp.schema import EvalRun, Evaluation, Generation, Judge, RewardSource
from rlhf_exp.stages import evaluate
from rlhf_exp.stages.compared import Comparer, said, score_of
from rlhf_exp.tracking import read_lines


@pytest.fixture
def run(base, run_config, context, adapters, monkeypatch):
    """run(policies, judge=.., ...) -> metrics, eval.json and Measured by name; scored by the length of answers."""

    def call(policies: list[str], judge_settings: Judge | None = None, **values) -> SimpleNamespace:
        source = values.pop("source", RewardSource(kind="function", function="regex:a"))
        parents = {"sft": adapters["sft"], "reward": adapters["reward"]}
        for place, text in enumerate(policies):
            if text in adapters:
                parents[f"compared_{place}"] = adapters[text]
        named = [str(adapters[text]) if text in adapters and text != "sft" else text for text in policies]
        config: EvalRun = run_config(
            "eval",
            eval=Evaluation(policies=named, **{"prompts": 8, "gold": "regex:e", "samples": 2} | values),
            generation=Generation(max_new_tokens=6),
            reward_source=source,
            judge=judge_settings or Judge(),
        )
        measured, measure = {}, evaluate.measure
        with monkeypatch.context() as patch:
            patch.setattr(
                evaluate,
                "measure",
                lambda *given: measured.setdefault(given[4].name, measure(*given)),
            )
            given = context(**parents)
            metrics = evaluate.run(config, given)
        content = json.loads((given.folder.path / "eval.json").read_text())
        return SimpleNamespace(
            metrics=metrics, content=content, measured=measured, config=config, folder=given.folder
        )

    return call


def figures(result) -> dict[str, dict]:
    return {policy["name"]: policy["metrics"] for policy in result.content["policies"]}


def by_hand(ours: list[float], theirs: list[float]) -> float:
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)) / len(
        ours
    )


def test_a_rule_compares_answers_to_the_same_prompt_and_noise(run):
    found = run(["other", "sft", "base"], judge="regex:[aeiou]{2}", samples_per_prompt=2)
    scores = {name: m.scores["judge"] for name, m in found.measured.items()}
    assert set(scores) == {"other", "sft", "base"} and all(len(row) == 16 for row in scores.values())
    for name in ("other", "base"):
        rate = figures(found)[name]["win_rate"]
        assert rate == pytest.approx(by_hand(scores[name], scores["sft"]))
        assert found.metrics[f"{name}/win_rate"] == rate
        low, high = (figures(found)[name][f"win_rate_{end}"] for end in ("low", "high"))
        assert low <= rate <= high and high > low
    assert "win_rate" not in figures(found)["sft"]
    assert found.content["judge"] == {"by": "the rule regex:[aeiou]{2}", "against": "sft"}
    assert [policy["name"] for policy in found.content["policies"]] == ["other", "sft", "base"]
    page = (found.folder.path / "report" / "report.html").read_text()
    assert "Win rate against sft" in page and (found.folder.path / "report" / "wins.png").is_file()


def test_two_policies_against_each_other_share_one(run):
    forth = run(["sft", "other"], judge="length")
    back = run(["sft", "other"], judge="length", against="other")
    ours, theirs = figures(forth)["other"], figures(back)["sft"]
    assert ours["win_rate"] == pytest.approx(1 - theirs["win_rate"])
    assert ours["win_rate_low"] == pytest.approx(1 - theirs["win_rate_high"])
    assert ours["win_rate_ties"] == theirs["win_rate_ties"]


def test_a_policy_against_itself_is_exactly_one_half():
    measured = SimpleNamespace(scores={"gold": [0.25, -1.0, 3.0] * 2}, texts=["a", "b", ""] * 2)
    config = EvalRun(stage="eval", eval=Evaluation(judge="gold"))
    metrics = Comparer(config, None).metrics(measured, measured, [])
    assert [metrics[f"win_rate{end}"] for end in ("", "_low", "_high", "_ties")] == [0.5, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("judge", "source", "key"),
    [
        ("learned", RewardSource(), "reward"),
        ("learned", RewardSource(kind="sum", parts=["1*learned", "-1*length"]), "judge"),
        ("gold", RewardSource(), "gold"),
        ("regex:e", RewardSource(), "gold"),  # eval.gold: computed once
        ("length", RewardSource(), "judge"),
        ("none", RewardSource(), None),
        ("model", RewardSource(), None),
    ],
)
def test_which_scores_decide(judge, source, key):
    config = EvalRun(stage="eval", eval=Evaluation(judge=judge, gold="regex:e"), reward_source=source)
    assert score_of(config) == key


def test_the_reward_model_of_a_sum_judges_alone(run):
    """The rule of the sum, much larger than the model's scores, does not count."""
    alone = run(["sft", "other"], judge="learned", source=RewardSource())
    summed = run(
        ["sft", "other"], judge="learned", source=RewardSource(kind="sum", parts=["1*learned", "99*length"])
    )
    assert summed.measured["other"].scores["judge"] == pytest.approx(
        alone.measured["other"].scores["reward"], abs=1e-5
    )
    assert figures(summed)["other"]["win_rate"] == figures(alone)["other"]["win_rate"]
    assert "judge" not in alone.measured["other"].scores


def test_a_model_reads_both_answers_in_both_orders(run, base):
    settings = Judge(model="base", template="{prompt}\nA: {first}\nB: {second}\nBest:")
    found = run(["sft", "other"], settings, judge="model", samples_per_prompt=2)
    prompts = sorted(load_view(found.config.dataset, "prompts", "heldout"), key=lambda prompt: prompt.id)[:8]
    asked = [str(prompt.prompt) for prompt in prompts for _ in range(2)]
    texts = [found.measured[name].texts for name in ("other", "sft")]
    verdicts = LocalJudge(base, settings).compare(asked, *texts)
    metrics = figures(found)["other"]
    assert metrics["win_rate"] == pytest.approx(sum(verdicts.wins.tolist()) / 16)
    assert metrics["judge_consistent"] == pytest.approx(sum(verdicts.consistent.tolist()) / 16)
    assert metrics["win_rate_ties"] == pytest.approx(1 - metrics["judge_consistent"])
    assert found.content["judge"]["by"] == "the model tiny, which reads each pair in both orders"


def test_a_model_of_its_own_judges(run, tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "critic")
    found = run(["sft", "other"], Judge(model=str(folder)), judge="model", prompts=3)
    assert 0 <= figures(found)["other"]["win_rate"] <= 1
    assert said(found.config) == "the model critic, which reads each pair in both orders"


def test_checkpoints_stand_side_by_side_in_the_order_asked_for(run):
    found = run(["other", "sft", "base"])
    for sample in found.content["samples"]:
        assert list(sample["responses"]) == ["other", "sft", "base"]
    page = (found.folder.path / "report" / "report.html").read_text()
    articles = page.split("<article")[1:]
    assert len(articles) == 2
    for article in articles:
        heads = [article.index(f"<h3>{name}</h3>") for name in ("other", "sft", "base")]
        assert heads == sorted(heads) and article.count("<h3>") == 3
    rows = list(read_lines(found.folder.path / "samples.jsonl"))
    by_policy = {
        name: [r["prompt"] for r in rows if r["policy"] == name] for name in ("other", "sft", "base")
    }
    assert by_policy["other"] == by_policy["sft"] == by_policy["base"] and len(by_policy["sft"]) == 8
    assert set(found.metrics) >= {"other/reward", "sft/reward", "base/reward", "last/reward"}


def test_relevance_is_the_mean_cosine(run, monkeypatch, tmp_path):
    """Vectors by hand: a text is (1, 0) if it has an a, else (.6, .8); the answer's prompt has one or has none."""

    def cosine(folder, prompts, answers, device):
        vectors = [[(1, 0) if "a" in text else (0.6, 0.8) for text in texts] for texts in (prompts, answers)]
        return [p[0] * r[0] + p[1] * r[1] for p, r in zip(*vectors, strict=True)]

    monkeypatch.setattr(relevance, "score", cosine)
    monkeypatch.setattr(relevance, "find", lambda encoder, download=False: tmp_path / encoder)
    found = run(["sft", "other"], encoder="some/encoder", prompts=6)
    prompts = sorted(load_view(found.config.dataset, "prompts", "heldout"), key=lambda prompt: prompt.id)[:6]
    for name in ("sft", "other"):
        same = [
            ("a" in str(p.prompt)) == ("a" in t)
            for p, t in zip(prompts, found.measured[name].texts, strict=True)
        ]
        assert figures(found)[name]["relevance"] == pytest.approx(sum(1 if s else 0.6 for s in same) / 6)
    assert "reference_relevance" not in figures(found)["sft"]  # reviews have no references
    assert "relevance" in found.content["data"]["metrics"]
    assert relevance.measure("x", ["a", "b"], ["a", None], ["a", "a"], "cpu") == pytest.approx(
        {"relevance": 0.8, "reference_relevance": 1.0}
    )


def test_without_encoder_and_judge_there_is_neither(run):
    found = run(["sft", "other"])
    assert not any("relevance" in key or "win" in key or "judge" in key for key in found.metrics)
    assert "judge" not in found.content
