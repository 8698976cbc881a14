"""stage=rft on the tiny model: what is sampled, kept, learned and written; rounds; going on after a stop."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.rules import length
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.schema import RFT, Generation, Optim, RewardSource, Train
from rlhf_exp.stages import rft, selection
from rlhf_exp.stages.prefer import EMPTY, EQUAL, UNFINISHED
from rlhf_exp.tracking import read_metrics

WEIGHTS = "adapter/adapter_model.safetensors"
LOW, NOT_BEST, KNOWN = "score below the threshold", "not among the best", "answers of an earlier round"


@pytest.fixture
def config(run_config):
    """config(samples=3, ...) -> RFTRun of few prompts and short answers, scored by the number of words."""

    def make(
        lr=1e-2, steps=0, epochs=1.0, batch=4, micro=4, gold="none", kind="function", tokens=6, **values
    ):
        return run_config(
            "rft",
            rft=RFT(**{"samples": 3, "prompts": 6, **values}),
            train=Train(steps=steps, epochs=epochs, batch_size=batch, micro_batch_size=micro),
            optim=Optim(lr=lr, schedule="constant"),
            generation=Generation(max_new_tokens=tokens),
            reward_source=RewardSource(kind=kind, function="length", gold=gold),
        )

    return make


@pytest.fixture
def made(config, context, adapters):
    """made("name", samples=2, ...) -> (metrics, rows of selected.jsonl, the run's folder)."""

    def make(name="run", parents=None, **values):
        inside = context(name, sft=adapters["sft"], **(parents or {}))
        metrics = rft.run(config(**values), inside)
        path = inside.folder.path
        rows = [json.loads(line) for line in (path / "selected.jsonl").read_text().splitlines()]
        return metrics, rows, path

    return make


def words(text: str) -> float:
    return length([""], [text])[0]


@pytest.fixture
def drawn(monkeypatch):
    """Every answer that a run samples, as (round, prompt id, text, score), in a list that fills."""
    found, sampled = [], selection.sampled

    def remember(config, context, roles, heads, part, number):
        count, rollout, texts, scores = sampled(config, context, roles, heads, part, number)
        ids = [prompt.id for prompt, _ in part for _ in range(count)]
        found.extend(zip([number] * len(ids), ids, texts, scores["score"], strict=True))
        return count, rollout, texts, scores

    monkeypatch.setattr(selection, "sampled", remember)
    return found


# ---------------------------------------------------------------- which answers are learned


def test_the_best_answer_of_each_prompt_is_kept(made, drawn):
    metrics, rows, path = made()
    assert len(drawn) == 18 and len(rows) == 6
    by_prompt = {}
    for _, prompt, text, score in drawn:
        assert score == words(text)
        by_prompt.setdefault(prompt, []).append((score, text))
    best = [
        max(each, key=lambda pair: pair[0]) for each in by_prompt.values()
    ]  # max: the first of equal ones
    assert [(row["score"], row["response"]) for row in rows] == best
    assert metrics["rft/score"] == pytest.approx(sum(s for _, _, _, s in drawn) / 18)
    assert metrics["rft/kept_score"] == pytest.approx(sum(s for s, _ in best) / 6)
    assert metrics["rft/kept_score"] > metrics["rft/score"]
    assert (metrics["rft/answers"], metrics["rft/kept"], metrics["rft/learned"]) == (18, 6, 6)
    (told,) = json.loads((path / "rft.json").read_text())["rounds"]
    assert (
        told["rft/kept"] + sum(told["left out"].values()) == 18
    )  # each answer is kept or left out for a reason
    assert set(told["left out"]) <= {NOT_BEST, EQUAL, EMPTY}


def test_several_answers_and_a_threshold(made, drawn):
    _, rows, path = made(keep=2, threshold=2.0)
    kept = Counter(row["prompt"] for row in rows)
    assert max(kept.values()) == 2 and min(row["score"] for row in rows) >= 2
    (told,) = json.loads((path / "rft.json").read_text())["rounds"]
    low = sum(score < 2 for _, _, _, score in drawn)
    assert low > 0 and told["left out"][LOW] == low
    texts = {(prompt, text) for _, prompt, text, _ in drawn}
    assert len(texts) == 18, "no two answers are equal, so none is left out for that"


def test_keep_0_learns_all_that_reach_the_threshold(made, drawn):
    _, rows, _ = made(keep=0, threshold=2.0)
    assert sorted(row["score"] for row in rows) == sorted(s for _, _, _, s in drawn if s >= 2)


def test_empty_equal_and_unfinished_answers_are_counted():
    texts, ended = ["good", "good", "", "cut", "off"], [True, True, True, False, False]
    kept = selection.usable(texts, ended, "keep", dropped := Counter())
    assert kept == [0, 3, 4] and dropped == {EQUAL: 1, EMPTY: 1}
    kept = selection.usable(texts, ended, "drop", dropped := Counter())
    assert kept == [0] and dropped == {EQUAL: 1, EMPTY: 1, UNFINISHED: 2}


def test_nothing_to_learn_is_one_line(made):
    line = r"none of 18 answers of round 1 is left to learn \(18 score below the threshold\): look at rft.threshold"
    with pytest.raises(InputError, match=line):
        made(threshold=1000.0)


def test_answers_depend_on_prompt_sample_and_round_alone(made, drawn, monkeypatch):
    made("few", prompts=3)
    few = set(drawn)
    drawn.clear()
    monkeypatch.setattr(selection, "ROWS", 7)
    made("many", prompts=6)
    assert few < set(drawn)


def test_only_training_prompts_are_answered(made, config, drawn):
    made(prompts=0, samples=2, steps=1)
    train = {prompt.id for prompt in load_view(config().dataset, "prompts", "train")}
    assert {prompt for _, prompt, _, _ in drawn} == train


def test_a_gold_scorer_sees_the_answers_and_decides_nothing(made):
    metrics, rows, _ = made(gold="regex:e")
    plain, same, _ = made("plain")
    assert [row["response"] for row in rows] == [row["response"] for row in same]
    assert 0 < metrics["rft/gold"] < 1 and "rft/gold" not in plain
    assert metrics["rft/kept_gold"] == sum("e" in row["response"] for row in rows) / 6


def test_a_reward_model_scores(made, adapters):
    _, rows, _ = made(kind="learned", parents={"reward": adapters["reward"]})
    assert len(rows) == 6 and all(row["score"] != words(row["response"]) for row in rows)


def test_what_was_learned_can_be_read_as_demonstrations(made, config):
    from rlhf_exp.schema import Dataset, Views

    _, rows, path = made()
    views = Views(demonstrations=str(path / "selected.jsonl"))
    data = Dataset(name="mine", family="jsonl", views=views, validation_share=0.0, heldout_share=0.0)
    found = load_view(data, "demonstrations", "train")
    assert [(each.prompt, each.response) for each in found] == [(r["prompt"], r["response"]) for r in rows]


# ---------------------------------------------------------------- what is learned of them


def peft_loss(base, folder, rows) -> float:
    """transformers' own mean over the answer tokens of given rows (asked, ids), one sequence at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model, total, tokens = PeftModel.from_pretrained(plain, folder).eval(), 0.0, 0
    for asked, ids in rows:
        labels = torch.tensor([[-100] * len(asked) + ids])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([asked + ids]), labels=labels).loss
        total, tokens = total + float(loss) * len(ids), tokens + len(ids)
    return total / tokens


@pytest.fixture
def learned(monkeypatch):
    """(asked, ids) of the rows of each optimiser step."""
    found, update = [], rft.update

    def remember(config, roles, batch: Rollout, training):
        found.append(list(zip(batch.prompts, batch.responses, strict=True)))
        return update(config, roles, batch, training)

    monkeypatch.setattr(rft, "update", remember)
    return found


def test_the_loss_is_the_mean_over_the_answers_tokens(made, base, adapters, learned):
    """Of the SFT adapter before the first step, as transformers computes it; micro-batches change nothing."""
    for micro in (6, 2):
        _, _, path = made(f"by{micro}", batch=6, micro=micro, steps=1, tokens=9)
        (line,) = (line for line in read_metrics(path / "metrics.jsonl") if "train/loss" in line)
        assert line["train/loss"] == pytest.approx(peft_loss(base, adapters["sft"], learned[-1]), rel=1e-4)
    one, two = (load_file(path.parent / f"by{micro}" / WEIGHTS) for micro in (6, 2))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_ids_are_learned_as_they_were_scored(made, learned, base):
    """An answer that ended is learned with its EOS, one that was cut off without."""
    _, rows, _ = made("cut", steps=1, batch=6, tokens=8)
    assert not any(row["ended"] for row in rows)
    assert all(len(ids) == 8 and base.eos_id not in ids for _, ids in learned[0])
    _, rows, _ = made("ended", steps=1, batch=64, tokens=40, prompts=60, unfinished="drop")
    assert len(rows) == len(learned[1]) > 3 and all(row["ended"] for row in rows)
    assert all(ids.index(base.eos_id) == len(ids) - 1 for _, ids in learned[1])


def test_it_starts_as_the_sft_adapter_and_moves_towards_its_answers(made, base, adapters, learned):
    _, _, path = made(lr=5e-3, epochs=8.0, batch=6)
    rows = learned[0]
    assert peft_loss(base, path / "adapter", rows) < peft_loss(base, adapters["sft"], rows) - 0.1
    _, _, still = made("still", lr=1e-12, steps=1)
    before, after = load_file(adapters["sft"] / "adapter_model.safetensors"), load_file(still / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_without_sft_it_starts_as_a_new_adapter(config, context):
    inside = context("plain")
    metrics = rft.run(config(steps=1), inside)
    assert metrics["rft/kept"] == 6 and (inside.folder.path / WEIGHTS).is_file()


def test_an_epoch_is_of_the_kept_answers(made, learned):
    made(batch=4, epochs=2.0)  # six answers: two steps an epoch
    assert len(learned) == 4
    made("few", batch=16, epochs=1.0)
    assert len(learned[-1]) == 6, "no answer is twice in a batch"


def test_the_base_is_left_as_it_was(config, context, adapters, base, fingerprint, unchanged):
    before = fingerprint(base)
    rft.run(config(), context(sft=adapters["sft"]))
    unchanged(base, before)


# ---------------------------------------------------------------- rounds


def test_a_later_round_samples_from_what_the_one_before_learned(made, drawn, base, context, config):
    """With the same noise: the adapter of a run of one round gives the second round's answers."""
    made("both", rounds=2, prompts=0, samples=2, steps=3, lr=5e-2)
    both = [row for row in drawn if row[0] == 2]
    drawn.clear()
    _, _, path = made("first", rounds=1, prompts=0, samples=2, steps=3, lr=5e-2)
    drawn.clear()
    asked = config(prompts=0, samples=2)
    inside = context("again", sft=path / "adapter")
    prompts, tokens = inside.read(asked.dataset, "prompts", "train")
    with Roles(base) as roles:
        roles.load("policy", path / "adapter")
        for part in selection.of_round(asked, list(zip(prompts, tokens.prompts, strict=True)), 2):
            selection.sampled(asked, inside, roles, {}, part, 2)
    assert [row[1:] for row in both] == [row[1:] for row in drawn]


def test_rounds_draw_other_prompts_and_the_pool_is_the_newest_or_all(made, drawn):
    _, newest, _ = made("newest", rounds=2, lr=1e-12)
    rounds = [{prompt for number, prompt, _, _ in drawn if number == n} for n in (1, 2)]
    assert rounds[0] != rounds[1]
    assert {row["round"] for row in newest} == {2} and len(newest) == 6
    metrics, union, path = made("union", rounds=2, lr=1e-12, pool="union")
    assert Counter(row["round"] for row in union) == {1: 6, 2: 6}
    assert (metrics["rft/kept"], metrics["rft/learned"]) == (6, 12)
    told = json.loads((path / "rft.json").read_text())["rounds"]
    assert [each["rft/round"] for each in told] == [1, 2]
    lines = read_metrics(path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    # two rounds of one part each; 6 / 4 -> 2 steps, then 12 / 4 -> 3
    assert ["train/loss" in line for line in lines] == [False, True, True, False, True, True, True]


def test_an_answer_that_an_earlier_round_learned_is_learned_once(config, context, adapters, base):
    asked, inside = config(), context(sft=adapters["sft"])
    prompts, tokens = inside.read(asked.dataset, "prompts", "train")
    (part,) = selection.of_round(asked, list(zip(prompts, tokens.prompts, strict=True)), 1)
    known: set[tuple[int, str]] = set()
    with Roles(base) as roles:
        roles.load("policy", adapters["sft"])
        first = selection.select(asked, inside, roles, {}, part, selection.Tally(1), known)
        again = selection.Tally(1)
        assert selection.select(asked, inside, roles, {}, part, again, known) == []
    assert len(first) == 6 and again.kept == 0 and again.dropped[KNOWN] == 6


# ---------------------------------------------------------------- a stop


@pytest.mark.parametrize("stop", [2, 4, 5, 8])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    made, config, context, adapters, monkeypatch, capsys, stop
):
    """Stopped while answers are sampled or learned, in either round; to the bit what nobody stopped."""
    monkeypatch.setattr(selection, "ROWS", 9)  # three prompts a part: two parts and two steps a round
    values = {"rounds": 2, "pool": "union", "epochs": 1.0}
    whole = made("whole", **values)
    inside = replace(context("stopped", sft=adapters["sft"]), checkpoint_every=1)
    count = [0]
    select, update = rft.select, rft.update

    def stopping(function):
        def call(*given):
            count[0] += 1
            if count[0] == stop:
                raise KeyboardInterrupt
            return function(*given)

        return call

    monkeypatch.setattr(rft, "select", stopping(select))
    monkeypatch.setattr(rft, "update", stopping(update))
    with pytest.raises(KeyboardInterrupt):
        rft.run(config(**values), inside)
    assert not (inside.folder.path / "selected.jsonl").exists()
    capsys.readouterr()
    metrics = rft.run(config(**values), inside)
    assert f"continued from step {stop - 1}" in capsys.readouterr().out
    for name in ("selected.jsonl", "rft.json", WEIGHTS):
        assert (inside.folder.path / name).read_bytes() == (whole[2] / name).read_bytes()
    assert metrics == pytest.approx(whole[0], nan_ok=True)
    clock = ("time/step", "tokens_per_second")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in clock} for line in read_metrics(path / "metrics.jsonl")]
        for path in (inside.folder.path, whole[2])
    )
    assert ours == theirs
