"""The key changes exactly where the result may change."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from omegaconf import MISSING

from rlhf_exp import schema
from rlhf_exp.fields import group, leaf, leaves
from rlhf_exp.store.keys import canonical, key_document, run_key

# Written by hand, not read from the schema: what a user may change and still get the same artifact.
NOT_IN_KEY = {
    # what a report read is
    "inputs",
    # names and paths: what they lead to is hashed instead
    *("model.name", "model.path", "model.source", "model.revision"),
    *("dataset.name", "dataset.template.name", "dataset.revision", "run_name", "output_dir"),
    *("dataset.views.demonstrations", "dataset.views.comparisons", "dataset.views.prompts"),
    *("adapters.sft", "adapters.reward", "adapters.reward_ensemble", "adapters.gold", "adapters.ppo"),
    *("adapters.dpo", "adapters.kto", "adapters.rft", "adapters.ilql"),
    # for people
    *("model.licence", "model.template", "model.notes"),
    # the memory estimate
    *("model.billion_params", "model.layers", "model.hidden_size", "model.vocab_size"),
    *("model.architecture", "model.inner_size", "model.heads", "model.kv_heads", "model.head_size"),
    *("memory.gradient_checkpointing", "memory.gb", "memory.ranks", "memory.device"),
    "ppo.micro_batch_tokens",
    # replaced by the dtype that it came to
    "model.dtype",
    # what prefer and its rounds made arrives as the parents' keys
    *("dataset.comparisons_from", "adapters.labeller", "upstream.labeller", "upstream.prefer"),
    *("prefer.rounds", "prefer.keep", "prefer.start"),
    # hardware
    *(
        "device",
        "threads",
        "strategy.name",
        "strategy.deepspeed",
        "train.micro_batch_size",
        "ppo.micro_batch_size",
    ),
    *("reward.share_prompts", "reward.micro_batch_tokens"),
    # how this command runs; an upstream override arrives as the parents' keys
    *(
        "resume",
        "checkpoint_every",
        "dry_run",
        "selfcheck",
        "upstream.sft",
        "upstream.reward",
        "upstream.gold",
        "upstream.ppo",
        "upstream.dpo",
        "upstream.kto",
        "upstream.rft",
        "upstream.ilql",
        "upstream.rloo",
    ),
    *("tracking.backend", "tracking.uri", "tracking.experiment"),
    # a run that was stopped early is never published (sweeps/pruning.py)
    *(f"early_stop.{leaf}" for leaf in ("rule", "metric", "grace", "trials", "guards")),
    # how a reward model is looked at; what the gate then has trained arrives as the parents' keys
    *("reward.probes", "reward_source.gate", "reward_source.patch_share"),
    # their content and names are
    *("eval.policies", "eval.encoder"),
    *("judge.model", "judge.batch_size"),
    *(f"reward_source.limits.{probe}" for probe in (*schema.PROBES, *schema.SAME)),
}


def not_in_key(stage: str) -> set[str]:
    """Of ppo all of `prefer` too: it is of the stages before, whose keys are in."""
    more = {f"prefer.{f.name}" for f in dataclasses.fields(schema.Prefer)}
    found = NOT_IN_KEY | (more if stage in ("ppo", "pipeline") else set())
    return found if stage in ("eval", "pipeline") else found | {"dataset.evaluate_on"}


def complete(stage: str) -> schema.Run:
    config = schema.RUNS[stage](stage=stage)
    if stage == "report":
        return config
    config.model.name, config.dataset.name, config.dataset.family = "tiny", "reviews", "reviews"
    return config


def inputs(**changes) -> dict[str, Any]:
    given = {
        "dtype": "float32",
        "base": "b0",
        "data": {"prompts": "d0"},
        "parents": {"sft": "s0"},
        "version": 1,
    }
    return given | changes


def other(field: dataclasses.Field, value: Any) -> Any:
    """A value of the same type that is not `value`."""
    if choices := [choice for choice in field.metadata.get("choices", ()) if choice != value]:
        return choices[0]
    if value is None:
        return 3 if "int" in field.type else 1.5 if "float" in field.type else "something"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return value | {"seed": 1}
    more = 1.5 if "float" in field.type else "more"
    return [*value, more] if isinstance(value, list) else value + "x"


def set_leaf(config: Any, key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for part in groups:
        config = getattr(config, part)
    assert hasattr(config, name)
    setattr(config, name, value)


@pytest.mark.parametrize("stage", list(schema.RUNS))
def test_each_leaf_changes_the_key_exactly_if_it_may_change_the_result(stage):
    before = run_key(complete(stage), **inputs())
    wrong = []
    for key, field, value in leaves(complete(stage)):
        changed = complete(stage)
        set_leaf(changed, key, other(field, value))
        if (run_key(changed, **inputs()) == before) != (key in not_in_key(stage)):
            wrong.append(key)
    assert wrong == []


# of the adapter that is not there when all weights are trained
OF_ADAPTER = {"lora.r", "lora.alpha", "lora.dropout", "lora.targets", "lora.rslora", "lora.dora"}
OF_ADAPTER |= {"model.lora_targets"}


def test_where_all_weights_are_trained_no_leaf_of_the_adapter_counts():
    def full() -> schema.Run:
        config = complete("sft")
        config.lora.full = True
        return config

    before = run_key(full(), **inputs())
    for key, field, value in leaves(full()):
        changed = full()
        set_leaf(changed, key, other(field, value))
        same = run_key(changed, **inputs()) == before
        assert same == (key in not_in_key("sft") | OF_ADAPTER), key
    assert before != run_key(complete("sft"), **inputs())


def test_the_list_of_leaves_outside_the_key_names_only_what_exists():
    names = {key for stage in schema.RUNS for key, _, _ in leaves(complete(stage))}
    assert names >= NOT_IN_KEY


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"base": "b1"},
        {"data": {"prompts": "d1"}},
        {"data": {"comparisons": "d0"}},
        {"data": {}},
        {"parents": {"sft": "s1"}},
        {"parents": {"reward": "s0"}},
        {"parents": {"sft": "s0", "reward": "r0"}},
        {"version": 2},
        {"extra": {"reward_function": "def f"}},
    ],
    ids=str,
)
def test_every_other_input_changes_the_key(change):
    assert run_key(complete("ppo"), **inputs(**change)) != run_key(complete("ppo"), **inputs())


def test_the_same_config_of_another_stage_has_another_key():
    keys = {run_key(complete(stage), **inputs()) for stage in schema.RUNS}
    assert len(keys) == len(schema.RUNS)


def test_parents_are_told_apart_by_role():
    one = inputs(parents={"sft": "k1", "reward": "k2"})
    swapped = inputs(parents={"sft": "k2", "reward": "k1"})
    assert run_key(complete("ppo"), **one) != run_key(complete("ppo"), **swapped)


def test_order_of_mappings_does_not_matter_and_no_extra_is_empty_extra():
    one = inputs(data={"a": "1", "b": "2"}, parents={"sft": "s", "reward": "r"}, extra={})
    two = inputs(data={"b": "2", "a": "1"}, parents={"reward": "r", "sft": "s"})
    assert run_key(complete("ppo"), **one) == run_key(complete("ppo"), **two)


def test_numbers_are_canonical_by_their_declared_type():
    plain, mixed = complete("sft"), complete("sft")
    mixed.lora.alpha, mixed.lora.dropout, mixed.lora.r = 32, -0.0, 16.0  # declared float, float, int
    assert run_key(mixed, **inputs()) == run_key(plain, **inputs())
    assert [canonical(mixed)[k] for k in ("lora.alpha", "lora.dropout", "lora.r")] == [32.0, 0.0, 16]
    assert "-0.0" not in key_document(mixed, **inputs())


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("lora.r", 1.5, "lora.r: expected int, got 1.5"),
        ("lora.r", True, "lora.r: expected int, got True"),
        ("optim.lr", "1e-4", "optim.lr: expected float, got '1e-4'"),
        ("dataset.family", object, "dataset.family: type has no place in a key"),
    ],
)
def test_a_value_of_another_type_has_no_key(key, value, error):
    config = complete("sft")
    set_leaf(config, key, value)
    with pytest.raises(TypeError, match=error):
        canonical(config)


def test_an_incomplete_config_has_no_key():
    config = complete("sft")
    config.dataset.family = MISSING
    with pytest.raises(ValueError, match=r"dataset\.family has no value"):
        canonical(config)


@dataclasses.dataclass
class Inner:
    rate: float = leaf(1, doc="declared float, given as int")
    names: list[str] = leaf(["b", "a"], doc="order counts")
    nothing: int | None = leaf(None, doc="unset")


@dataclasses.dataclass
class Hidden:
    still: int = leaf(1, doc="keyed, but in a group that is not")


@dataclasses.dataclass
class Outer:
    zeta: str = leaf("ü", doc="not ASCII")
    on: bool = leaf(True, doc="bool")
    path: str = leaf("/x", doc="not keyed", keyed=False)
    table: dict[str, Any] = leaf({"y": 1.5, "x": [1, None]}, doc="a dict")
    inner: Inner = group(Inner, doc="a group")
    hidden: Hidden = group(Hidden, doc="a group outside the key", keyed=False)


# Written by hand. If it has to change, every artifact in every store is built again: raise FORMAT.
GOLDEN = (
    '{"base":"ba5e","config":{"inner.names":["b","a"],"inner.nothing":null,"inner.rate":1.0,"model.dtype":"bfloat16",'
    '"on":true,"table":{"x":[1,null],"y":1.5},"zeta":"\\u00fc"},"data":{"prompts":"da7a"},"extra":{"f":"src"},'
    '"format":1,"parents":{"reward":"4e","sft":"5f"},"version":3}'
)


def test_golden_key():
    given = {
        "dtype": "bfloat16",
        "base": "ba5e",
        "data": {"prompts": "da7a"},
        "parents": {"sft": "5f", "reward": "4e"},
        "version": 3,
        "extra": {"f": "src"},
    }
    assert key_document(Outer(), **given) == GOLDEN
    assert run_key(Outer(), **given) == hashlib.sha256(GOLDEN.encode()).hexdigest()
    assert run_key(Outer(), **given) == "b633ed7138b2759865e2bda8c0a66e059a031b71ad105093c2e561697e4aee09"


SCRIPT = """
import json, sys
from rlhf_exp import schema
from rlhf_exp.store.keys import run_key
config = schema.PPORun(stage="ppo")
config.model.name, config.dataset.name, config.dataset.family = "tiny", "reviews", "reviews"
print(run_key(config, **json.loads(sys.argv[1])))
"""


def test_another_process_with_another_hash_seed_gives_the_same_key():
    given = inputs(data={"prompts": "d", "comparisons": "e"}, extra={"x": "1", "y": "2"})
    for seed in ("1", "77"):
        command = [sys.executable, "-c", SCRIPT, json.dumps(given)]
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == run_key(complete("ppo"), **given)
