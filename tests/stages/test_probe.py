"""Stage probe and the end of stage reward on the tiny model: files, figures, what is left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
from rlhf_exp.schema import PROBES, SAME, Limits, Probe, Reward, Train
from rlhf_exp.stages import gate, probe, reward
from rlhf_exp.store.runs import FINISHED

DATA = {"max_response_tokens": 64, "validation_share": 0.15}


@pytest.fixture
def config(run_config):
    def make(dataset=None, **values):
        return run_config("probe", dataset=DATA | (dataset or {}), probe=Probe(**{"pairs": 5, **values}))

    return make


def report_of(context) -> dict:
    return json.loads((context.folder.path / gate.PROBE / gate.REPORT).read_text())


def plain_scorer(base, folder):
    """Prompt and answer texts -> score: PEFT's own model, one sequence at a time, the head's file."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model, head = (
        PeftModel.from_pretrained(plain, folder).eval(),
        load_file(folder / "head.safetensors"),
    )

    def score(prompt: str, answer: list[int]) -> float:
        ids = base.tokenizer(prompt, add_special_tokens=False)["input_ids"][-24:] + answer
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return float(hidden[0, -1] @ head["weight"] + head["bias"])

    return score


def test_a_report_by_an_independent_forward(base, adapters, config, context):
    run, given = config(), context(reward=adapters["reward"])
    metrics = probe.run(run, given)
    found, score = report_of(given), plain_scorer(base, adapters["reward"])
    rows = sorted(load_view(run.dataset, "comparisons", "validation"), key=lambda row: row.id)[:5]
    assert [row["id"] for row in found["real"]] == [row.id for row in rows]
    assert (found["pairs"], found["split"]) == (5, "validation")

    def ids(text: str, end: bool = True) -> list[int]:
        return base.tokenizer(text, add_special_tokens=False)["input_ids"] + [base.eos_id] * end

    chosen = [score(row.prompt, ids(f" {row.chosen}")) for row in rows]
    rejected = [score(row.prompt, ids(f" {row.rejected}")) for row in rows]
    assert [row["chosen"] for row in found["real"]] == pytest.approx(chosen, abs=1e-4)
    assert [row["rejected"] for row in found["real"]] == pytest.approx(rejected, abs=1e-4)
    for kind, text in (("empty", " "), ("eos_only", "")):
        scores = [score(row.prompt, ids(text)) for row in rows]
        above = sum(s > c for s, c in zip(scores, chosen, strict=True))
        part = found["kinds"][kind]
        assert (part["above"], part["n"], metrics[f"probe/{kind}"]) == (above, 5, above / 5)
        assert part["shift"] == pytest.approx((sum(scores) - sum(chosen)) / 5, abs=1e-4)
    echo = [score(row.prompt, ids(f" {row.prompt}")) - c for row, c in zip(rows, chosen, strict=True)]
    assert found["kinds"]["echo"]["shift"] == pytest.approx(sum(echo) / 5, abs=1e-4)


def test_what_must_not_matter_does_not(adapters, config, context):
    """float32: padding and neighbours to 1e-5; whitespace gives other tokens."""
    given = context(reward=adapters["reward"])
    probe.run(config(), given)
    found = report_of(given)["invariances"]
    assert set(found) == set(SAME)
    for name in ("padding", "neighbours"):
        assert found[name]["largest"] < 1e-5 and found[name]["flips"] == 0
    assert found["whitespace"]["n"] == 5 and found["whitespace"]["mean"] > 1e-3


def test_every_kind_is_there_with_a_picture(adapters, config, context):
    given = context(reward=adapters["reward"])
    metrics = probe.run(config(), given)
    assert tuple(report_of(given)["kinds"]) == PROBES
    assert metrics["probe/pairs"] == 5 and {f"probe/{kind}" for kind in PROBES} <= set(metrics)
    assert (given.folder.path / gate.PROBE / gate.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_some_kinds_and_all_pairs(adapters, config, context):
    given = context(reward=adapters["reward"])
    run = config(pairs=0, kinds=["short", "padding"])
    probe.run(run, given)
    found = report_of(given)
    assert (list(found["kinds"]), list(found["invariances"])) == (["short"], ["padding"])
    assert found["pairs"] == len(load_view(run.dataset, "comparisons", "validation")) > 20


def test_another_split(adapters, config, context):
    given = context(reward=adapters["reward"])
    run = config(split="heldout", kinds=["empty"])
    probe.run(run, given)
    rows = load_view(run.dataset, "comparisons", "heldout")
    assert {row["id"] for row in report_of(given)["real"]} <= {row.id for row in rows}


def test_the_same_seed_gives_the_same_report_and_another_other_texts(adapters, config, context):
    reports = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        given = context(name, reward=adapters["reward"])
        probe.run(replace(config(), seed=seed), given)
        reports.append(report_of(given))
    assert reports[0] == reports[1]
    assert reports[0]["real"] == reports[2]["real"]
    assert reports[0]["kinds"]["shuffled"] != reports[2]["kinds"]["shuffled"]


def test_pairs_whose_answer_is_cut_are_left_out_and_without_any_it_is_an_error(
    adapters, config, context, capsys
):
    run, given = (
        config({"max_response_tokens": 36}, pairs=0, kinds=["empty"]),
        context(reward=adapters["reward"]),
    )
    probe.run(run, given)
    found, every = report_of(given), load_view(run.dataset, "comparisons", "validation")
    left_out = len(every) - found["pairs"]
    assert left_out > 0
    said = f"probes: {found['pairs']} of {len(every)} pairs, {left_out} whose chosen answer is cut left out"
    assert said in capsys.readouterr().out
    with pytest.raises(InputError, match=r"of at most dataset\.max_response_tokens=3 tokens: raise it"):
        probe.run(config({"max_response_tokens": 3}), context("none", reward=adapters["reward"]))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_head_that_says_nothing(adapters, config, context, tmp_path, value):
    """Zeros: every score is the bias, and the gate sees it; nan is refused, and no report is written."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapters["reward"], tmp_path / "broken")
    file = tmp_path / "broken" / "head.safetensors"
    save_file(load_file(file) | {"weight": torch.full_like(load_file(file)["weight"], value)}, file)
    given = context(reward=tmp_path / "broken")
    if value:
        with pytest.raises(
            InputError, match=r"nan or inf \(\d+ of \d+ probed answers\): give another adapters"
        ):
            probe.run(config(), given)
        assert not (given.folder.path / gate.PROBE).exists()
    else:
        probe.run(config(), given)
        assert report_of(given)["spread"] == 0 and report_of(given)["accuracy"]["share"] == 0.5
        assert gate.failures(report_of(given), Limits()) == []
        assert gate.useless(report_of(given)) == "gives all chosen answers the same score"


def test_the_base_is_as_before(base, adapters, config, context, fingerprint, unchanged):
    before = fingerprint(base)
    probe.run(config(), context(reward=adapters["reward"]))
    unchanged(base, before)


# ---------------------------------------------------------------- the end of stage reward


@pytest.fixture
def reward_config(run_config):
    def make(dataset=None, **options):
        return run_config(
            "reward",
            dataset=DATA | {"limit": 12} | (dataset or {}),
            train=Train(steps=1, batch_size=4, micro_batch_size=4),
            reward=Reward(**{"probes": 4, **options}),
        )

    return make


def test_the_reward_stage_probes_what_it_has_made(base, reward_config, config, context):
    given = context()
    metrics = reward.run(reward_config(), given)
    found = report_of(given)
    assert found["pairs"] == 4 and metrics["probe/empty"] == found["kinds"]["empty"]["share"]
    validation = load_view(reward_config().dataset, "comparisons", "validation")
    assert [row["id"] for row in found["validation"]] == [row.id for row in validation]
    right = sum(row["chosen"] > row["rejected"] for row in found["validation"])
    assert metrics["validation/accuracy"] == pytest.approx(right / len(validation))
    # the stage on the finished run says the same
    given.folder.finish({})
    assert given.folder.status == FINISHED
    again = context("again", reward=given.folder.path)
    probe.run(config(pairs=4), again)
    assert report_of(again)["kinds"] == found["kinds"]


@pytest.mark.parametrize(
    ("dataset", "options"),
    [({}, {"probes": 0}), ({"validation_share": 0.0}, {}), ({"max_response_tokens": 4}, {})],
    ids=["probes=0", "no validation pairs", "all answers cut"],
)
def test_where_there_is_nothing_to_probe_with_training_ends_well(reward_config, context, dataset, options):
    given = context()
    metrics = reward.run(reward_config(dataset, **options), given)
    assert not (given.folder.path / gate.PROBE).exists()
    assert not any(name.startswith("probe/") for name in metrics)
    assert "train/loss" in metrics


def test_negatives_are_trained_on_as_pairs(reward_config, context, capsys):
    given = context()
    metrics = reward.run(reward_config(negatives=["empty", "echo"], negatives_share=0.5), given)
    assert metrics["data/pairs"] == 24
    assert "synthetic negatives: 12 beside 12 real pairs (empty 6, echo 6)" in capsys.readouterr().out
