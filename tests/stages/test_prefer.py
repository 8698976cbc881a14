"""stage=prefer on the tiny model: what is sampled, labelled, left out and written; and going on after a stop."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from rlhf_exp.data import labels
from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.judge import Verdicts
from rlhf_exp.rewards.ranking import NO_VERDICT
from rlhf_exp.schema import Generation, Prefer
from rlhf_exp.stages import labellers, prefer
from rlhf_exp.stages.labellers import Group
from rlhf_exp.stages.prefer import EMPTY, EQUAL, REPEATED, UNFINISHED, Tally


@pytest.fixture
def config(run_config):
    """config(samples=2, ...) -> PreferRun, of few prompts and short answers."""

    def make(**values):
        asked = {"labellers": ["length"], "samples": 3, "prompts": 6, "validation_prompts": 3, **values}
        return run_config("prefer", prefer=Prefer(**asked), generation=Generation(max_new_tokens=6))

    return make


@pytest.fixture
def made(config, context, adapters):
    """made("name", samples=2, ...) -> (metrics, rows, the run's folder)."""

    def make(name="run", parents=None, **values):
        inside = context(name, sft=adapters["sft"], **(parents or {}))
        metrics = prefer.run(config(**values), inside)
        return metrics, labels.read(inside.folder.path / labels.FILE), inside.folder

    return make


def words(text: str) -> int:
    """Of answers without ideographs, as rewards.rules.length counts them."""
    return sum(any(c.isalnum() for c in word) for word in text.split())


def group(*texts: str) -> Group:
    return Group(Prompt(1, "Q", None), [1], list(texts), [[2]] * len(texts), ["sft"] * len(texts))


# ---------------------------------------------------------------- what is written


def test_the_chosen_answer_is_the_better_one_by_its_margin(made):
    metrics, rows, folder = made(pairs="all", samples=4)
    assert len(rows) > 9
    for row in rows:
        assert row["margin"] == words(row["chosen"]) - words(row["rejected"]) > 0
        assert (row["labeller"], row["source"], row["round"]) == ("length", "sft", 1)
    report = json.loads((folder.path / "prefer.json").read_text())
    assert report["answers"] == 4 * 9
    assert report["comparisons"]["all"] == len(rows) == metrics["prefer/comparisons"]
    # of each prompt's six pairs each is kept or left out for a reason
    assert set(report["left out"]) <= {"ties", EQUAL, EMPTY}


def test_one_pair_a_prompt_with_best_and_worst(made):
    _, rows, _ = made()
    assert max(Counter(row["prompt"] for row in rows).values()) == 1
    every = made("all", pairs="all")[1]
    for row in rows:
        answers = {
            each[side] for each in every if each["prompt"] == row["prompt"] for side in ("chosen", "rejected")
        }
        assert words(row["chosen"]) == max(map(words, answers))
        assert words(row["rejected"]) == min(map(words, answers))


def test_answers_depend_on_prompt_and_sample_alone(made, monkeypatch):
    """Not on which other prompts there are, nor on how many are answered at once."""
    few = made("few", prompts=2)[1]
    monkeypatch.setattr(prefer, "ROWS", 5)
    many = made("many", prompts=6)[1]
    assert few and {json.dumps(row) for row in few} <= {json.dumps(row) for row in many}


def test_another_round_has_other_prompts_and_other_noise(made):
    first, second = (
        {(row["prompt"], row["chosen"], row["rejected"]) for row in made(f"round{i}", prompts=30, round=i)[1]}
        for i in (1, 2)
    )
    asked = {prompt for prompt, *_ in first} & {prompt for prompt, *_ in second}
    assert asked and first.isdisjoint(second)
    few = [{row["prompt"] for row in made(f"few{i}", round=i)[1]} for i in (1, 2)]
    assert few[0] != few[1]


def test_held_out_prompts_are_not_answered_and_splits_stay_apart(made, config):
    _, rows, folder = made(prompts=0, validation_prompts=0)
    own = config().dataset
    views = replace(own.views, comparisons=str(folder.path / labels.FILE))
    labelled = replace(own, comparisons_from="prefer", views=views)
    heldout = {prompt.prompt for prompt in load_view(own, "prompts", "heldout")}
    assert heldout.isdisjoint(row["prompt"] for row in rows)
    sides = {
        split: {r.prompt for r in load_view(labelled, "comparisons", split)}
        for split in ("train", "validation")
    }
    for split, found in sides.items():
        assert found <= {prompt.prompt for prompt in load_view(own, "prompts", split)}
    assert sides["train"].isdisjoint(sides["validation"])
    assert sum(len(load_view(labelled, "comparisons", split)) for split in sides) == len(rows)


def test_policies_are_told_apart(made, adapters):
    _, rows, _ = made(policies=["sft", "base"], pairs="all", samples=2)
    assert {row["source"] for row in rows} == {"sft", "base", "base + sft"}
    alone = made("alone", policies=["base"], pairs="all", samples=2)[1]
    # the base has other noise at second place, so its answers are others
    assert {row["source"] for row in alone} == {"base"}


def test_a_reward_model_labels(made, adapters):
    _, rows, folder = made(
        labellers=["learned", "length"], parents={"labeller": adapters["reward"]}, pairs="all"
    )
    assert {row["labeller"] for row in rows} == {"learned"}
    (each,) = json.loads((folder.path / "prefer.json").read_text())["agreement"]
    assert each["labellers"] == ["learned", "length"] and each["pairs"] > 0
    again = sum((words(row["chosen"]) - words(row["rejected"]) > 0) for row in rows)
    ties = sum(words(row["chosen"]) == words(row["rejected"]) for row in rows)
    assert each["pairs"] == len(rows) - ties
    assert each["share"] == pytest.approx(again / each["pairs"])


def test_the_union_holds_earlier_comparisons_first_and_each_pair_once(made):
    _, first, folder = made("first")
    metrics, rows, _ = made("second", parents={"earlier": folder.path}, round=2, prompts=8)
    assert rows[: len(first)] == first
    assert {row["round"] for row in rows[len(first) :]} == {2}
    assert metrics["prefer/comparisons"] == len(rows) > len(first)
    _, same, third = made("third", parents={"earlier": folder.path})  # the same noise: nothing new
    assert same == first
    assert json.loads((third.path / "prefer.json").read_text())["left out"][REPEATED] == len(first)


def test_the_comparisons_are_in_the_manifest(made):
    *_, folder = made()
    folder.finish({})
    folder.verify()
    path = folder.path / labels.FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"comparisons\.jsonl is truncated"):
        folder.verify()


# ---------------------------------------------------------------- what is left out


def test_empty_equal_and_unfinished_answers_are_counted():
    tally, found = Tally(), group()
    for text, ended, rule in [
        ("good", True, "keep"),
        ("good", True, "keep"),
        ("", True, "keep"),
        ("cut", False, "keep"),
        ("off", False, "drop"),
    ]:
        prefer._take(found, "sft", [7], text, ended, rule, tally)
    assert found.texts == ["good", "cut"] and found.sources == ["sft", "sft"]
    assert tally.dropped == {EQUAL: 1, EMPTY: 1, UNFINISHED: 1}
    assert (tally.answers, tally.unfinished) == (5, 2)


def test_no_pair_at_all_is_said_with_the_reasons(made):
    with pytest.raises(InputError, match=r"none of 27 answers to 9 prompts gives a pair \(.*margin below"):
        made(min_margin=1000.0)


def test_a_split_that_no_pair_falls_into_is_said(made, monkeypatch):
    picks = prefer.picks
    seen = []

    def training_only(*given):
        seen.append(1)
        return picks(*given) if len(seen) <= 6 else []

    monkeypatch.setattr(prefer, "picks", training_only)  # the six training prompts come first
    with pytest.raises(
        InputError, match=r"no pair of validation prompts is left.*prefer\.validation_prompts"
    ):
        made()


# ---------------------------------------------------------------- a judge


class Biased:
    """Prefers the longer answer, by `bias` the one that is shown first; notes what it was shown."""

    def __init__(self, bias: float):
        self.bias, self.shown = bias, []

    def compare(self, prompts, first, second) -> Verdicts:
        self.shown += zip(prompts, first, second, strict=True)
        leads = torch.tensor([float(len(a) - len(b)) for a, b in zip(first, second, strict=True)])
        return Verdicts(
            torch.stack((torch.sigmoid(leads + self.bias), torch.sigmoid(leads - self.bias)), dim=1)
        )


def test_a_judge_that_likes_the_first_place_gives_no_verdict_on_near_answers():
    judge = Biased(bias=2.5)
    (fair,), (found,) = (labellers.judged(each, [group("a", "bb", "ccccc")]) for each in (Biased(0), judge))
    # leads of 1, 4 and 3 against a bias of 2.5
    assert found[0][1] is None and found[1][0] is None
    assert found[2][0] > 0 and found[2][1] > 0 and found[0][2] == -found[2][0]
    assert all(fair[i][j] is not None for i in range(3) for j in range(3))
    mean = (torch.sigmoid(torch.tensor(4 + 2.5)) + torch.sigmoid(torch.tensor(4 - 2.5))) / 2
    assert found[2][0] == pytest.approx(float(2 * mean - 1))
    assert judge.shown == [("Q", "a", "bb"), ("Q", "a", "ccccc"), ("Q", "bb", "ccccc")]


def test_several_prompts_do_not_mix():
    found = labellers.judged(Biased(0), [group("a", "bb"), group("ccc", "dd", "e")])
    assert [len(margins) for margins in found] == [2, 3]
    assert found[0][1][0] > 0 and found[1][0][1] > 0 and found[1][1][2] > 0


def test_pairs_without_a_verdict_are_not_written(config):
    asked, tally = config(labellers=["judge"], pairs="all"), Tally()
    judge = Biased(bias=2.5)
    prefer.add(asked, [group("a", "bb", "ccccc")], {"judge": lambda g: labellers.judged(judge, g)}, tally)
    assert [(row["chosen"], row["rejected"]) for row in tally.rows] == [("ccccc", "a"), ("ccccc", "bb")]
    assert tally.dropped == {NO_VERDICT: 1}
    assert tally.orders == {"judge": [0, -1, -1]}


def test_the_base_itself_judges_without_an_adapter(config, context, adapters, base, monkeypatch):
    asked = config(labellers=["judge"], pairs="all", prompts=2, validation_prompts=2)
    asked.judge.model = "base"
    inside = context(sft=adapters["sft"])
    with Roles(base) as roles:
        roles.load("answers_0", adapters["sft"])
        label = labellers.labellers(asked, inside, roles)["judge"]
        with_adapters = label([group("one", "two, three", "four")])
    with Roles(base) as roles:
        alone = labellers.labellers(asked, inside, roles)["judge"]([group("one", "two, three", "four")])
    assert with_adapters == alone


# ---------------------------------------------------------------- a stop


def test_an_interrupted_run_goes_on_and_writes_the_same(made, config, context, adapters, monkeypatch, capsys):
    monkeypatch.setattr(prefer, "ROWS", 6)  # two prompts a step: five steps
    whole = made("whole", labellers=["length", "sentiment"])
    inside = replace(context("stopped", sft=adapters["sft"]), checkpoint_every=1)
    add, steps = prefer.add, []

    def stopping(*given):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        add(*given)

    monkeypatch.setattr(prefer, "add", stopping)
    asked = config(labellers=["length", "sentiment"])
    with pytest.raises(KeyboardInterrupt):
        prefer.run(asked, inside)
    assert not (inside.folder.path / labels.FILE).exists()  # nothing half-written to be read
    capsys.readouterr()
    metrics = prefer.run(asked, inside)
    assert "continued from step 2" in capsys.readouterr().out
    assert len(steps) == 3 + 3  # the third again, the fourth, the fifth
    for name in (labels.FILE, "prefer.json"):
        assert (inside.folder.path / name).read_bytes() == (whole[2].path / name).read_bytes()
    assert metrics == pytest.approx(whole[0], nan_ok=True)
