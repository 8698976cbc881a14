"""Which trials are one but for the seed, what they are called, what is warned of."""

from __future__ import annotations

import pytest

from rlhf_exp.evaluation.comparison import ABSENT, differences, groups, labels, warnings, written
from rlhf_exp.evaluation.trials import HELDOUT, TRAINING, Row, Trial
from rlhf_exp.store.show import flat
from tests.evaluation.run_folders import config


def trial(stage="ppo", key="abcdef012345", **values) -> Trial:
    found = Trial(f"{stage}/{key}", stage, key, "FINISHED", f"/{key}", config=flat(config(stage, **values)))
    found.run_name = found.config["run_name"]
    found.rows = {TRAINING: [Row("ppo@1", 1, {"kl": 0.0})]}
    return found


def members(found):
    return [[t.key for t in group.trials] for group in found]


def test_seeds_are_one_group_and_settings_are_not():
    trials = [
        trial(key="a", seed=0, ppo__kl_coef=0.1),
        trial(key="b", seed=0, ppo__kl_coef=0.2),
        trial(key="c", seed=1, ppo__kl_coef=0.1),
    ]
    assert members(groups(trials)) == [["a", "c"], ["b"]]
    assert [g.label for g in groups(trials)] == ["kl_coef=0.1", "kl_coef=0.2"]
    assert groups(trials)[0].seeds == ["0", "1"]


@pytest.mark.parametrize(
    ("values", "together"),
    [
        ({"reward_source__gate": "off", "reward_source__limits__empty": 0.5}, True),
        ({"run_name": "x", "output_dir": "o", "threads": 7, "tracking__experiment": "e"}, True),
        ({"upstream__sft": {"seed": 4}}, True),
        ({"upstream__sft": {"train": {"steps": 4}}}, False),
        ({"adapters__sft": "elsewhere"}, False),
        ({"dataset__views__prompts": "rows.jsonl"}, False),
        ({"reward_source__gold": "length"}, False),
        ({"model__name": "other"}, False),
    ],
)
def test_what_makes_another_group(values, together):
    assert (len(groups([trial(key="a"), trial(key="b", seed=1, **values)])) == 1) is together


def test_other_data_under_the_same_path_is_another_group():
    one, two = trial(key="a"), trial(key="b", seed=1)
    one.data, two.data = {"prompts": "d0"}, {"prompts": "d1"}
    assert len(groups([one, two])) == 2


def test_stages_and_trials_without_a_config_are_apart():
    nothing = [Trial(f"ppo/{k}", "ppo", k, "EMPTY", f"/{k}") for k in "xy"]
    assert members(groups([trial(key="a"), trial("ilql", key="b"), *nothing])) == [["a"], ["b"], ["x"], ["y"]]


def test_differences_are_the_keys_that_differ():
    found = differences(
        [trial(ppo__kl_coef=0.1, optim__lr=1e-3), trial(ppo__kl_coef=0.2, optim__lr=1e-3, seed=1)]
    )
    assert found == {"ppo.kl_coef": [0.1, 0.2], "seed": [0, 1]}
    assert differences([trial(), trial(threads=4, run_name="x")]) == {}


def test_keys_of_some_stages_come_last():
    found = differences([trial(optim__lr=1e-3), trial("ilql", optim__lr=1e-4)])
    keys = list(found)
    assert keys[:2] == ["stage", "optim.lr"]
    assert found["ppo.kl_coef"][1] is ABSENT
    assert keys.index("ppo.kl_coef") > keys.index("optim.lr")


def test_names():
    assert labels([trial()]) == ["ppo"]
    pair = [trial(ppo__kl_coef=0.1, optim__lr=1e-3), trial(ppo__kl_coef=0.2, optim__lr=1e-4, seed=1)]
    assert labels(pair) == ["kl_coef=0.1 lr=0.001", "kl_coef=0.2 lr=0.0001"]  # not the seed
    # of stages the stage; what only one stage has says no more
    assert labels([trial(), trial("ilql")]) == ["ppo", "ilql"]
    assert labels([trial(run_name="mine"), trial(ppo__kl_coef=0.2)])[0] == "mine"
    # equal names are told apart by the key
    assert labels([trial(run_name="a", key="111111ff"), trial(run_name="a", key="222222ff")]) == [
        "a 111111",
        "a 222222",
    ]
    assert len(labels([trial(run_name="n" * 200), trial()])[0]) == 60


def test_keys_with_the_same_last_part_are_written_longer():
    pair = [trial(), trial(dataset__fields__prompt="a", dataset__template__prompt="b {prompt}")]
    assert "fields.prompt=a" in labels(pair)[1] and "template.prompt=b {prompt}" in labels(pair)[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0.1, "0.1"),
        (1e-5, "1e-05"),
        ([1, "a"], "[1,a]"),
        (ABSENT, "–"),
        ("x", "x"),
    ],
)
def test_values_are_written_as_typed(value, text):
    assert written(value) == text


# ---------------------------------------------------------------- warnings


def evaluated(**values) -> Trial:
    found = trial(ppo__kl_coef=values.pop("kl_coef", 0.1))
    found.rows[HELDOUT] = [Row("sft", 0, {"kl": 0.0})]
    found.evaluation = flat(config("eval", **values))
    return found


def test_nothing_to_warn_of():
    assert warnings([evaluated(), evaluated(kl_coef=0.2, seed=3, run_name="x")]) == []


def test_tasks_that_differ():
    assert warnings([trial(), trial(dataset__name="tldr")]) == [
        "These runs are of different tasks, whose scores do not compare: tiny on reviews; tiny on tldr."
    ]


def test_scores_that_differ():
    assert warnings([trial(reward_source__gold="length"), trial(reward_source__gold="sentiment")]) == [
        "Training scores do not compare: reward_source.gold is length and sentiment."
    ]


def test_evaluations_that_differ():
    assert warnings(
        [evaluated(eval__prompts=64), evaluated(eval__prompts=128), evaluated(eval__prompts=256)]
    ) == ["The evaluations do not compare: eval.prompts is 64, 128 and 256."]


def test_evaluations_that_only_show_others_compare():
    """Neither who was evaluated, nor what of them, nor what the gate looked at, makes a figure another one."""
    one = evaluated(eval__policies=["sft", "ppo"], eval__samples=6, reward_source__gate="warn")
    two = evaluated(eval__policies=["sft", "dpo"], eval__samples=3, reward_source__gate="off", kl_coef=0.2)
    two.evaluation |= {"eval.checkpoints": False, "eval.best": False, "eval.ema": False}
    two.evaluation |= {"reward_source.limits.empty": 0.5, "dataset.views.comparisons": "other.jsonl"}
    assert warnings([one, two]) == []
    two.evaluation["eval.gold"] = "length"
    assert warnings([one, two]) == ["The evaluations do not compare: eval.gold is sentiment and length."]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"parts": ["1*learned", "-5*length"]},
            "parts is [1*learned,-0.01*length] and [1*learned,-5*length]",
        ),
        ({"ensemble": 3}, "ensemble is 1 and 3"),
        ({"ensemble_lambda": 2.0}, "ensemble_lambda is 0.5 and 2"),
    ],
)
def test_sums_and_ensembles_that_differ(values, told):
    usual = {"kind": "sum", "parts": ["1*learned", "-0.01*length"]}
    pair = [{f"reward_source__{k}": v for k, v in (usual | more).items()} for more in ({}, values)]
    assert warnings([trial(**some) for some in pair]) == [
        f"Training scores do not compare: reward_source.{told}."
    ]


def scored_by(source: str, seed: int = 0, **models: str) -> Trial:
    found = evaluated() if source == HELDOUT else trial()
    found.config["seed"], found.scorers[source] = seed, models
    return found


@pytest.mark.parametrize(("source", "what"), [(TRAINING, "Training scores"), (HELDOUT, "The evaluations")])
def test_reward_models_that_differ(source, what):
    """Another reward model is another unit; that of another seed goes with the seed, which is said in other words."""
    a, b = "a" * 64, "b" * 64
    pair = [scored_by(source, reward=a), scored_by(source, reward=b)]
    assert warnings(pair) == [
        f"{what} do not compare: the reward model reward is aaaaaa and bbbbbb, each with a scale of its own."
    ]
    assert warnings([scored_by(source, reward=a), scored_by(source, 1, reward=a)]) == []
    (seeds,) = warnings([scored_by(source, reward=a), scored_by(source, 1, reward=b)])
    assert seeds.startswith(f"{what} of different seeds are by reward models of their own (reward)")
    (gold,) = warnings([scored_by(source, reward=a, gold=a), scored_by(source, reward=a, gold=b)])
    assert "the reward model gold is aaaaaa and bbbbbb" in gold


def test_runs_that_are_in_some_pictures_or_none():
    silent = trial(key="s")
    silent.rows = {}
    lost = Trial("ppo/lost", "ppo", "l", "FAILED", "/l")
    assert warnings([evaluated(), trial(key="t"), silent, lost]) == [
        "Without an evaluation, so in the training curves only: ppo/t.",
        "Without a KL in the log and without an evaluation, so in no picture: ppo/s.",
    ]
