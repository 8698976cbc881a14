"""What has to hold before PPO trains: each check can fail, says why, and touches nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.schema import Template
from rlhf_exp.stages import ppo, provenance, selfcheck
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.selfcheck import Trial
from rlhf_exp.store.frozen import config_text
from rlhf_exp.tracking import read_metrics
from tests.stages.conftest import reviews
from tests.stages.plain import nudge

TITLES = (
    "KL to the reference is 0",
    "the ratio of new and old probabilities is 1",
    "the sampler's log-probs are the scoring forward's",
    "rows score the same alone and padded",
    "EOS can be drawn",
    "reward heads are the trained ones after save and load",
    "the reward model sees the tokens it was trained on",
    "adapters belong to this base",
    "held-out prompts are not trained on",
    "the memory plan fits",
)
FUNCTION = {"kind": "function", "function": "length"}


@pytest.fixture
def started(base, adapters, context, ppo_config):
    """(config, context, actors, prompts, encoded) as `ppo.run` has them; parents may be replaced."""
    opened = []

    def make(settings=None, reward_source=None, on=base, generation=None, parents=None, **values):
        config = ppo_config(
            settings, {"max_new_tokens": 12, **(generation or {})}, reward_source=reward_source, **values
        )
        folders = {"sft": adapters["sft"], "reward": adapters["reward"]} | (parents or {})
        if reward_source:
            del folders["reward"]
        given = context(on=on, **folders)
        opened.append(Roles(on))
        actors = build_actors(config, given, opened[-1])
        prompts, tokens = given.read(config.dataset, "prompts", "train")
        return config, given, actors, prompts, tokens.prompts

    yield make
    for roles in opened:
        roles.close()


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if re.match(r"(ok|FAIL|\(off\)) ", line)]


def failures(arguments) -> list[str]:
    """The lines of the InputError, without the last, which says how to go on."""
    with pytest.raises(InputError) as caught:
        selfcheck.run(*arguments)
    assert caught.value.problems[-1] == "selfcheck=warn trains all the same"
    return caught.value.problems[:-1]


# ---------------------------------------------------------------- a sound start


@pytest.mark.parametrize(
    "generation",
    [{}, {"top_p": 0.8, "temperature": 0.7}, {"repetition_penalty": 1.3}, {"min_new_tokens": 11}],
    ids=["plain", "top-p", "penalty", "minimum"],
)
def test_a_sound_start_passes_and_is_listed(started, generation, capsys):
    arguments = started(generation=generation)
    capsys.readouterr()
    selfcheck.run(*arguments)
    found = lines(capsys)
    assert [line[:6] for line in found] == ["ok    "] * len(TITLES)
    for line, title in zip(found, TITLES, strict=True):
        assert line[6:].startswith(f"{title} (")
    assert re.search(r"4 prompts, \d+ tokens, largest difference 0\)", found[0])


def test_in_bfloat16_too(started, bf16_base, capsys):
    arguments = started(on=bf16_base)
    for folder in (arguments[1].parents["sft"], arguments[1].parents["reward"]):
        assert json.loads((folder / "base.json").read_text())["hash"] == bf16_base.hash
    selfcheck.run(*arguments)
    assert len(lines(capsys)) == len(TITLES)


def test_without_reward_model_nothing_is_said_of_one(started, capsys):
    selfcheck.run(*started(reward_source=FUNCTION))
    assert [line for line in TITLES if "reward" not in line] == [
        line[6:].partition(" (")[0] for line in lines(capsys)
    ]


def test_a_run_is_bit_for_bit_the_same_with_and_without(base, adapters, context, ppo_config, capsys):
    def figures(level: str):
        config = ppo_config({"steps": 3, "epochs": 2, "critic": "own"}, selfcheck=level)
        given = context(level, sft=adapters["sft"], reward=adapters["reward"])
        ppo.run(config, given)
        metrics = [
            {k: v for k, v in line.items() if "time/" not in k and "second" not in k}
            for line in read_metrics(given.folder.path / "metrics.jsonl")
        ]
        files = [given.folder.path / name / "adapter_model.safetensors" for name in ("adapter", "critic")]
        return metrics, [file.read_bytes() for file in files], torch.get_rng_state().tolist()

    assert figures("strict") == figures("off")
    assert len(lines(capsys)) == len(TITLES)  # of one of the two


def test_it_leaves_weights_gradients_and_generators_alone(started, base, fingerprint, unchanged):
    arguments = started({"faults": ["ref_with_dropout"]})  # draws noise
    before, state = fingerprint(base), torch.get_rng_state()
    selfcheck.run(*arguments)
    unchanged(base, before)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- levels


def test_strict_stops_before_training_warn_says_so_off_does_not_look(
    base, adapters, context, ppo_config, monkeypatch, capsys
):
    monkeypatch.setattr(provenance, "available", lambda device: 1.0)
    given = {"sft": adapters["sft"], "reward": adapters["reward"]}
    with pytest.raises(InputError, match=r"the memory plan fits \(about .* free 0 kB\): set "):
        ppo.run(ppo_config(), context("strict", **given))
    assert not (context("strict", **given).folder.path / "metrics.jsonl").exists()
    assert sum(line.startswith("FAIL ") for line in lines(capsys)) == 1
    ppo.run(ppo_config(selfcheck="warn"), context("warn", **given))
    (failed,) = [line for line in lines(capsys) if line.startswith("FAIL ")]
    assert failed.startswith("FAIL  the memory plan fits (")
    ppo.run(ppo_config(selfcheck="off"), context("off", **given))
    assert lines(capsys) == []


def test_all_failures_at_once(started, monkeypatch):
    monkeypatch.setattr(provenance, "available", lambda device: 1.0)
    arguments = started()
    nudge(arguments[2])
    found = failures(arguments)
    assert len(found) == 2
    assert found[0].startswith("self-check: not so: KL to the reference is 0 (")
    assert "adapters.sft" in found[0]


@pytest.mark.parametrize(
    ("fault", "title"),
    [
        ("wrong_reference", TITLES[0]),
        ("ref_with_dropout", TITLES[0]),
        ("random_reward_head", TITLES[5]),
        ("score_without_eos", TITLES[6]),
    ],
)
def test_a_fault_waives_its_own_check_and_no_other(started, fault, title, capsys):
    arguments = started({"faults": [fault]})
    capsys.readouterr()
    selfcheck.run(*arguments)
    off = [line for line in lines(capsys) if not line.startswith("ok ")]
    assert len(off) == 1
    assert off[0].startswith(f"(off) {title} (")


# ---------------------------------------------------------------- what was asked for, but has to be known


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"top_k": 5, "min_new_tokens": 0}, "top_k=5"),
        ({"top_p": 0.8, "min_p": 0.05, "min_new_tokens": 0}, "top_p=0.8, min_p=0.05"),
        ({"repetition_penalty": 1.3, "min_new_tokens": 0}, "repetition_penalty=1.3"),
        ({"temperature": 0.7, "min_new_tokens": 0}, "temperature=0.7"),
        ({"begin_suppress_tokens": ["eos"], "min_new_tokens": 0}, "begin_suppress_tokens=['eos']"),
        ({}, "min_new_tokens=1"),  # the default's guard against empty answers
        ({"min_new_tokens": 0}, None),
    ],
    ids=str,
)
def test_raw_logprobs_are_a_note_and_no_failure(started, generation, said, capsys):
    """The answers are not drawn from what their log-probs are of, unless nothing changes the distribution."""
    notes = {}
    for mode in ("raw", "sampled"):
        arguments = started(generation={**generation, "logprob_mode": mode})
        capsys.readouterr()
        selfcheck.run(*arguments)  # strict: a failure would be an error
        found = [line for line in capsys.readouterr().out.splitlines() if "EOS can be drawn" not in line]
        notes[mode] = [line for line in found if line.startswith("note  ")]
        assert len([line for line in found if line.startswith("ok    ")]) == len(TITLES) - 1
    assert notes["sampled"] == []
    if said is None:
        assert notes["raw"] == []
        return
    (note,) = notes["raw"]
    assert note.startswith("note  log-probs are not of the distribution that answers are sampled from (")
    assert f"({said})" in note
    assert "generation.logprob_mode=raw" in note


# ---------------------------------------------------------------- policy, reference, sampler


@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_ratio_that_is_not_1(started, monkeypatch, factor):
    arguments = started()
    sound = selfcheck.policy_and_value

    def other(actors, batch):
        hidden, value = sound(actors, batch)
        return (hidden * factor, value)

    monkeypatch.setattr(selfcheck, "policy_and_value", other)
    (line,) = failures(arguments)
    assert "the ratio of new and old probabilities is 1" in line


def test_a_sampler_that_says_something_else(started, monkeypatch):
    arguments = started()
    sound = selfcheck.generate

    def other(*given):
        rollout = sound(*given)
        return rollout._replace(logprobs=[row + 0.01 for row in rollout.logprobs])

    monkeypatch.setattr(selfcheck, "generate", other)
    (line,) = failures(arguments)
    assert "the sampler's log-probs are the scoring forward's (mean 0.01, largest 0.01)" in line


def test_padding_that_reaches_real_tokens(started, monkeypatch):
    """A trunk whose numbers depend on how wide the batch is."""
    arguments = started()
    sound = Roles.trunk
    monkeypatch.setattr(
        Roles,
        "trunk",
        lambda self, role, ids, **more: sound(self, role, ids, **more) * (1 + 0.01 * ids.shape[1]),
    )
    found = failures(arguments)
    assert any("rows score the same alone and padded" in line for line in found)
    # rows of one length are not padded, so nothing could differ
    rows = [i for i, ids in enumerate(arguments[4]) if len(ids) == 24][:4]
    few = [[sequence[i] for i in rows] for sequence in arguments[3:]]
    trial = Trial(*(arguments[0], arguments[2]), *few)
    assert list(selfcheck.scoring(trial))[-1].ok == (len({len(r) for r in trial.rollout.responses}) == 1)


def test_reward_scores_that_depend_on_padding(started, monkeypatch):
    arguments = started()
    sound = selfcheck.score_sequences

    def other(roles, role, head, sequences, size):
        return [value + 0.1 * (size > 1) for value in sound(roles, role, head, sequences, size)]

    monkeypatch.setattr(selfcheck, "score_sequences", other)
    (line,) = failures(arguments)
    assert "rows score the same alone and padded" in line


@pytest.mark.parametrize("least", [11, 12, 40])
def test_eos_that_is_forbidden_everywhere(started, least):
    config, _, actors, prompts, encoded = started()
    config = replace(config, generation=replace(config.generation, min_new_tokens=least))
    assert selfcheck.eos_reachable(Trial(config, actors, prompts, encoded)).ok == (least == 11)


def test_eos_without_probability(started, base, monkeypatch):
    config, _, actors, prompts, encoded = started()
    trial = Trial(config, actors, prompts, encoded)
    assert selfcheck.eos_reachable(trial).ok
    weight, _ = base.output_layer
    bias = torch.zeros(len(weight))
    bias[base.eos_id] = -1e4
    monkeypatch.setattr(type(base), "output_layer", property(lambda _: (weight, bias)))
    check = selfcheck.eos_reachable(trial)
    assert not check.ok
    assert "generation.min_new_tokens" in check.cause


def test_a_reward_model_that_gives_nan(started):
    arguments = started()
    (head,) = arguments[2].reward_heads.values()
    with torch.no_grad():
        head.weight.fill_(math.nan)
    found = failures(arguments)
    assert "scores are finite" in found[0]
    assert "adapters.reward, model.dtype" in found[0]
    assert not any("padded" in line for line in found)


@pytest.mark.parametrize(
    "generation", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"greedy": True}], ids=str
)
def test_a_sampler_that_never_keeps_eos_is_a_note(started, generation, capsys):
    """The tiny model's weights are random: of some hundred tokens EOS is never the most probable one."""
    arguments = started(generation={**generation, "min_new_tokens": 0})
    assert all(
        ids[-1] != arguments[2].base.eos_id for ids in Trial(*arguments[:1], *arguments[2:]).rollout.responses
    )
    capsys.readouterr()
    selfcheck.run(*arguments)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note ")]
    assert note.startswith("note  EOS can be drawn (")
    assert "kept by the sampler in 0% of " in note and "generation.top_k, top_p, min_p" in note


def test_a_weight_that_is_nan(started):
    arguments = started()
    with torch.no_grad():
        arguments[2].roles.parameters("policy")[0][0, 0] = math.nan
    (line,) = failures(arguments)
    assert "answers can be sampled (row 0, answer token 0: the logits hold nan or inf" in line
    assert "adapters.sft" in line


# ---------------------------------------------------------------- where things come from


def test_an_adapter_of_another_base(started, adapters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapters["sft"], other)
    (other / "base.json").write_text('{"hash": "0123", "name": "another"}')
    (line,) = failures(started(parents={"sft": other}))
    assert "adapters belong to this base (not sft)" in line
    assert "adapters.sft was trained on another base" in line


def test_a_foreign_adapter_says_nothing_of_its_base(started, adapters, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(adapters["sft"], other)
    (other / "base.json").unlink()
    selfcheck.run(*started(parents={"sft": other}))
    assert "adapters belong to this base (reward; by shape alone: sft)" in capsys.readouterr().out


def test_a_head_that_was_drawn_anew(started):
    arguments = started()
    arguments[2].reward_heads["reward"].reset(99)
    (line,) = failures(arguments)
    assert "reward heads are the trained ones" in line
    assert "adapters.reward" in line


@pytest.fixture
def trained_with(adapters, run_config, tmp_path):
    """A reward run's folder whose frozen config has these settings of the dataset."""

    def make(**dataset):
        folder = tmp_path / "reward_run"
        for name, files in (("adapter", ("adapter*", "base.json")), ("head", ("head*",))):
            (folder / name).mkdir(parents=True)
            for pattern in files:
                for file in adapters["reward"].glob(pattern):
                    shutil.copy(file, folder / name)
        (folder / "config.yaml").write_text(config_text(run_config("reward", dataset), []))
        return folder

    return make


@pytest.mark.parametrize(
    ("dataset", "what"),
    [
        ({}, None),
        ({"limit": 5}, None),
        ({"template": Template(prompt="Q: {prompt}")}, "prompts"),
        ({"template": Template(response="{response}")}, "answers"),
        ({"max_response_tokens": 4}, "answers"),
    ],
    ids=["same", "limit", "prompt", "response", "cut"],
)
def test_the_tokens_that_the_reward_model_was_trained_on(started, trained_with, dataset, what, capsys):
    arguments = started(parents={"reward": trained_with(**dataset)})
    if what is None:
        selfcheck.run(*arguments)
        assert "template of a given adapter not known" not in capsys.readouterr().out
        return
    (line,) = failures(arguments)
    assert "the reward model sees the tokens it was trained on" in line
    assert f"the {what} differ from those that reward was trained on: " in line


def test_an_answer_without_eos(started):
    arguments = started({"faults": ["score_without_eos"]})
    config, context, actors, prompts, encoded = arguments
    check = provenance.reward_tokens(config, context, actors, prompts, encoded)
    assert not check.ok
    assert "the ends differ" in check.cause


def test_a_frozen_config_is_read_back(run_config, tmp_path):
    config = run_config("reward", {"limit": 7, "template": Template(prompt="Q: {prompt}")})
    (tmp_path / "config.yaml").write_text(config_text(config, []))
    assert provenance.dataset_of(tmp_path) == config.dataset
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    content["dataset"]["of_a_later_version"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert provenance.dataset_of(tmp_path) == config.dataset
    assert provenance.dataset_of(tmp_path / "nowhere") is None


def test_held_out_prompts_that_are_trained_on(started, trained_with):
    config, context, _, prompts, _ = started()
    heldout = load_view(config.dataset, "prompts", "heldout")
    assert provenance.overlap(config, context, prompts).ok
    check = provenance.overlap(config, context, [*prompts, *heldout[:3]])
    assert (check.ok, check.detail) == (False, "3 rows of ppo")


def test_a_parent_that_held_out_less(started, trained_with):
    # no shares: all openings that are held out here were trained on there
    folder = trained_with(heldout_share=0.0, validation_share=0.0)
    config, context, _, prompts, _ = started(parents={"reward": folder})
    check = provenance.overlap(config, context, prompts)
    assert not check.ok
    assert re.fullmatch(r"\d+ rows of reward", check.detail)
    assert "dataset.heldout_share" in check.cause


def test_closed_worlds_evaluate_on_training_prompts(started):
    config, context, _, prompts, _ = started()
    config = replace(config, dataset=reviews(evaluate_on="train"))
    assert provenance.overlap(config, context, prompts).detail == "dataset.evaluate_on=train asks for it"


# ---------------------------------------------------------------- memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """What the system says of its memory: kB available, and a container's limit, use and cache in bytes."""

    def say(available=None, limit="max", current=0, cache=0):
        if available is not None:
            (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available} kB\n")
        for name, value in (("max", limit), ("current", current), ("stat", f"anon 5\ninactive_file {cache}")):
            (tmp_path / f"memory.{name}").write_text(f"{value}\n")
        monkeypatch.setattr(provenance, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(provenance, "CGROUP", tmp_path)
        return provenance.available(torch.device("cpu"))

    return say


def test_free_memory_is_the_systems_or_the_containers(machine):
    assert machine() is None
    assert machine(2000) == 2000 * 1024
    assert machine(2000, limit=1_000_000, current=400_000, cache=100_000) == 700_000
    assert machine(1, limit=1_000_000, current=400_000) == 1024


def test_the_plan_counts_what_is_still_to_come(started, monkeypatch):
    config, context, actors, _, _ = started()
    for free, fine in ((1e12, True), (1e6, False), (None, True)):
        monkeypatch.setattr(provenance, "available", lambda device, free=free: free)
        assert provenance.memory_fits(config, context, actors).ok == fine
    large = replace(config, ppo=replace(config.ppo, batch_size=10**6))
    monkeypatch.setattr(provenance, "available", lambda device: 1e9)
    check = provenance.memory_fits(large, context, actors)
    assert not check.ok
    assert " more in prefill, free 1.00 GB" in check.detail  # a million prompts at once
    assert check.cause.startswith("set ppo.batch_size=500000 (saves ")
