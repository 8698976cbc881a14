"""The schema: bounds and joint rules, suggestions, and the documents made from it."""

from __future__ import annotations

import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import MISSING, OmegaConf

from rlhf_exp import fields as fields_module
from rlhf_exp import helppage, schema
from rlhf_exp.fields import did_you_mean, group, leaf, leaves, range_text, type_text, value_problem, walk

DOCS = Path(__file__).resolve().parent.parent / "docs"


def sound(stage="ppo"):
    """A config with everything in it that has no default."""
    run = schema.RUNS[stage]()
    run.stage = stage
    if stage == "report":
        run.inputs = "outputs"
        return run
    run.model.name, run.model.lora_targets = "m", ["q_proj"]
    run.dataset.name = run.dataset.family = "d"
    run.dataset.views = schema.Views("d", "d", "d")
    return run


@pytest.mark.parametrize("stage", schema.STAGES)
def test_the_defaults_are_sound(stage):
    assert schema.problems(sound(stage)) == []


def test_everything_without_a_value_is_named():
    assert schema.problems(schema.RUNS["sft"]()) == [
        "stage has no value: Which stage this is.",
        "model.name has no value: The file's name in conf/model, for display.",
        "dataset.name has no value: The file's name in conf/dataset, for display.",
        "dataset.family has no value: The loader in rlhf_exp/data that reads this schema.",
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("ppo.kl_coef", -0.1, "ppo.kl_coef must be at least 0, got -0.1"),
        ("ppo.kl_coef", 0.0, None),
        ("optim.lr", 0.0, "optim.lr must be more than 0, got 0.0"),
        ("ppo.gamma", 1.5, "ppo.gamma must be at most 1, got 1.5"),
        ("ppo.gamma", 1.0, None),
        ("lora.dropout", 1.0, "lora.dropout must be less than 1, got 1.0"),
        ("generation.top_p", 0.0, "generation.top_p must be more than 0, got 0.0"),
        ("ppo.kl_estimator", "k4", "ppo.kl_estimator must be one of k1, k2, k3, got k4"),
        ("ppo.kl_coef", math.nan, "ppo.kl_coef must be a finite number, got nan"),
        ("optim.lr", math.inf, "optim.lr must be a finite number, got inf"),
        ("model.layers", 0, "model.layers must be more than 0, got 0"),
        ("model.layers", None, None),
    ],
)
def test_bounds(key, value, problem):
    run = sound()
    section, name = key.split(".")
    setattr(getattr(run, section), name, value)
    assert schema.problems(run) == ([problem] if problem else [])


def test_all_problems_at_once_and_joint_rules_after_them():
    run = sound()
    run.ppo.minibatches = 5
    run.seed, run.ppo.lam, run.lora.r = -1, 2.0, 0
    run.ppo.foo = 1
    assert schema.problems(run) == [
        "unknown key ppo.foo",
        "seed must be at least 0, got -1",
        "lora.r must be more than 0, got 0",
        "ppo.lam must be at most 1, got 2.0",
    ]
    run = sound()
    run.ppo.minibatches = 5
    run.generation.min_new_tokens = 48
    run.dataset.validation_share = run.dataset.heldout_share = 0.5
    run.dataset.views.prompts = None
    run.model.lora_targets = []
    assert schema.problems(run) == [
        "dataset.views.prompts is null: dataset d has no prompts for ppo",
        "lora.targets is [auto], but model m has no lora_targets: name the modules",
        "ppo.minibatches must divide ppo.batch_size, got 5 and 32",
        "generation.min_new_tokens must be less than generation.max_new_tokens, got 48 and 48",
        "dataset.validation_share + dataset.heldout_share must be less than 1, got 0.5 + 0.5",
    ]
    assert schema.problems(run, across=False) == []


@pytest.mark.parametrize(
    ("batch", "micro", "wrong"), [(16, 16, False), (16, 4, False), (16, 5, True), (8, 16, False)]
)
def test_micro_batches_divide_the_batch(batch, micro, wrong):
    run = sound("reward")
    run.train.batch_size, run.train.micro_batch_size = batch, micro
    expected = [f"train.micro_batch_size must divide train.batch_size, got {micro} and {batch}"]
    assert schema.problems(run) == (expected if wrong else [])


def test_no_module_to_wrap():
    run = sound()
    run.lora.targets = []
    assert schema.problems(run) == ["lora.targets must name a module, or be [auto]"]


@pytest.mark.parametrize(
    ("stage", "view"),
    [
        ("sft", "demonstrations"),
        ("reward", "comparisons"),
        ("ppo", "prompts"),
        ("eval", "prompts"),
        ("pipeline", "prompts"),
    ],
)
def test_a_stage_reads_one_view(stage, view):
    run = sound(stage)
    run.dataset.views = schema.Views(**{view: "d"})
    assert schema.problems(run) == []
    setattr(run.dataset.views, view, None)
    assert schema.problems(run) == [f"dataset.views.{view} is null: dataset d has no {view} for {stage}"]


def test_an_unknown_key_deep_inside():
    run = sound()
    run.dataset.template.trunctate = "left"
    problem = "unknown key dataset.template.trunctate; did you mean dataset.template.truncate?"
    assert schema.problems(run) == [problem]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ppo.klcoef", "; did you mean ppo.kl_coef?"),
        ("lr", "; did you mean optim.lr?"),
        ("ppo.lr", "; did you mean optim.lr or ppo.lam?"),
        ("kl_coeff", "; did you mean ppo.kl_coef?"),
        ("lora.rank", "; did you mean lora.r?"),
        ("zzz", ""),
    ],
)
def test_did_you_mean(word, said):
    known = ["seed", "lora", "lora.r", "optim", "optim.lr", "ppo", "ppo.kl_coef", "ppo.lam"]
    assert did_you_mean(word, known) == said


def test_every_leaf_is_documented_and_typed():
    for cls in schema.RUNS.values():
        for key, f, value in walk(cls()):
            assert f.metadata["doc"].strip(), key
            assert isinstance(f.metadata["keyed"], bool), key
            if not is_dataclass(value):
                assert type_text(f), key
                assert value == MISSING or value_problem(key, f, value) is None, key


def test_the_missing_value_is_that_of_omegaconf():
    assert fields_module.MISSING == MISSING


def test_leaf_and_group_keep_what_they_are_told():
    f = leaf(1, doc="d", ge=0, lt=2, keyed=False)
    assert dict(f.metadata) == {"doc": "d", "keyed": False, "ge": 0, "lt": 2}
    assert range_text(f) == ">= 0, < 2"
    assert range_text(leaf("a", doc="d", choices=("a", "b"))) == "a | b"
    assert group(schema.Lora, doc="d").default_factory is schema.Lora
    # a mutable default is made anew
    first, second = schema.Lora(), schema.Lora()
    first.targets.append("x")
    assert second.targets == ["auto"]


def test_keys_have_sections_and_leaves_in_order():
    keys = schema.keys("sft")
    assert keys.index("stage") == 0
    assert keys.index("dataset") < keys.index("dataset.views") < keys.index("dataset.views.prompts")
    assert "ppo.kl_coef" not in keys and "ppo.kl_coef" in schema.keys("pipeline")
    assert [key for key, _, _ in leaves(schema.Lora())][:4] == ["r", "alpha", "dropout", "targets"]


@pytest.mark.parametrize("stage", schema.STAGES)
def test_omegaconf_takes_the_classes_and_gives_them_back(stage):
    run = sound(stage)
    again = OmegaConf.to_object(OmegaConf.structured(run))
    assert again == run
    assert type(again) is schema.RUNS[stage]


def test_the_reference_is_current():
    assert (DOCS / "config.md").read_text(encoding="utf-8") == helppage.reference(), (
        "run: python -m rlhf_exp.helppage > docs/config.md"
    )


def test_the_reference_has_every_key_once():
    rows = re.findall(r"^\| `([\w.]+)` \|", (DOCS / "config.md").read_text(encoding="utf-8"), re.MULTILINE)
    expected = {key for cls in schema.RUNS.values() for key, _, _ in leaves(cls())}
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize(
    ("key", "cells"),
    [
        ("optim.lr", ["a number", "`0.0001`", "> 0", "yes"]),
        ("model.path", ["text or null", "`null`", "", ""]),
        ("tracking.backend", ["text", "`mlflow`", "mlflow \\| none", ""]),
        ("dataset.template.response", ["text", '`" {response}"`', "", "yes"]),
        ("dataset.family", ["text", "required", "", "yes"]),
        ("ppo.whiten_advantages", ["true or false", "`true`", "", "yes"]),
        ("ppo.micro_batch_size", ["a whole number", "`32`", ">= 0", ""]),
    ],
)
def test_a_row_of_the_reference(key, cells):
    line = next(line for line in helppage.reference().splitlines() if line.startswith(f"| `{key}` |"))
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:6]] == cells


def test_a_section_out_of_the_key_takes_its_leaves_along(monkeypatch):
    """`keyed=False` on a group holds for what is in it, whatever the leaf says."""
    strategy = next(f for f in fields(schema.Run) if f.name == "strategy")
    assert strategy.metadata["keyed"] is False
    name = next(f for f in fields(schema.Strategy) if f.name == "name")
    monkeypatch.setattr(name, "metadata", {**name.metadata, "keyed": True})
    line = next(line for line in helppage.reference().splitlines() if line.startswith("| `strategy.name`"))
    assert "| yes |" not in line
