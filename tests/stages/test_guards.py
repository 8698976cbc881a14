"""Rules over metrics: synthetic series whose verdicts are worked out by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields

import pytest

from rlhf_exp import schema
from rlhf_exp.errors import InputError
from rlhf_exp.paths import conf_dir
from rlhf_exp.schema import PPO
from rlhf_exp.stages import guards
from rlhf_exp.stages.guards import BOUNDS, Guards, trend

SOUND = {
    "objective/scores": 1.0,
    "objective/kl": 2.0,
    "objective/rewards": 0.9,
    "objective/entropy": 3.0,
    "policy/loss": 0.1,
    "policy/approxkl": 0.01,
    "policy/ratio_mean": 1.0,
    "policy/grad_norm": 0.5,
    "policy/clipfrac": 0.1,
    "critic/loss": 0.2,
    "response/empty_rate": 0.0,
    "response/length_mean": 30.0,
    "response/eos_rate": 0.8,
    "response/distinct_2": 0.9,
    "response/repetition": 0.1,
}
# guard -> metric, a value just inside and one just outside the default
EDGES = {
    "empty": ("response/empty_rate", 0.5, 0.51),
    "eos": ("response/eos_rate", 0.05, 0.04),
    "distinct_2": ("response/distinct_2", 0.1, 0.09),
    "repetition": ("response/repetition", 0.5, 0.51),
    "entropy": ("objective/entropy", 0.05, 0.04),
    "kl": ("objective/kl", 50.0, 50.1),
    "clipfrac": ("policy/clipfrac", 0.5, 0.51),
    "length": ("response/length_mean", 15.0, 14.9),  # half of the first iterations' 30
}


def ppo(**values) -> PPO:
    return PPO(save_every=2, guards=schema.Guards(**values))


def names(fired) -> list[str]:
    return [one.guard for one in fired]


def watch(series, **values):
    """The guards' names that fire at each iteration of a series of changes to SOUND."""
    mine = Guards()
    return [
        names(mine.watch(ppo(**values), step, SOUND | change)) for step, change in enumerate(series, start=1)
    ]


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("name", EDGES)
def test_each_fires_past_its_default_and_not_at_it(name):
    metric, inside, outside = EDGES[name]
    series = [{}, {}, {}, {metric: inside}, {metric: outside}]
    assert watch(series) == [[], [], [], [], [name]]


def test_every_bound_and_every_action_has_its_leaf():
    leaves = {f.name for f in fields(schema.Guards)}
    for bound in BOUNDS:
        assert bound.leaf in leaves
        assert f"{bound.guard}_action" in leaves
    assert {bound.guard for bound in BOUNDS} == set(EDGES)


def test_what_it_says_holds_the_figure_the_bound_and_the_key():
    mine = Guards()
    (fired,) = mine.watch(ppo(kl=3.0, kl_action="stop"), 1, SOUND | {"objective/kl": 4.25})
    assert (fired.metric, fired.value, fired.bound, fired.action) == ("objective/kl", 4.25, 3.0, "stop")
    assert fired.says == "KL to the reference, nats an answer, 4.25 is above ppo.guards.kl=3"


def test_zero_is_off():
    off = {b.leaf: 0.0 for b in BOUNDS} | {"length_share": 0.0, "hacking_window": 0}
    bad = {metric: outside for metric, _, outside in EDGES.values()}
    assert watch([{}, {}, {}, bad], **off)[-1] == []
    assert set(watch([{}, {}, {}, bad])[-1]) == set(EDGES)


def test_one_that_fired_is_silent_for_patience_iterations_the_others_are_not():
    bad = {"response/empty_rate": 0.9}
    both = bad | {"policy/clipfrac": 0.9}
    found = watch([{}, bad, bad, both, bad, bad, bad], patience=2)
    assert found == [[], ["empty"], [], ["clipfrac"], ["empty"], [], []]


@pytest.mark.parametrize("name", ["eos", "distinct_2", "entropy"])
def test_a_run_that_began_past_the_bound_is_left_alone(name):
    metric, inside, outside = EDGES[name]
    assert watch([{metric: outside}] * 3) == [[], [], []]
    assert watch([{metric: inside}, {metric: outside}])[1] == [name]


def test_empty_answers_count_from_the_first_iteration():
    assert watch([{"response/empty_rate": 0.9}]) == [["empty"]]


def test_length_is_compared_with_the_mean_of_the_first_iterations():
    lengths = [20.0, 40.0, 30.0, 14.9, 15.1]  # the mean of three is 30
    series = [{"response/length_mean": n} for n in lengths]
    assert watch(series) == [[], [], [], ["length"], []]
    assert watch(series, baseline=2) == [[], [], [], ["length"], []]
    assert watch(series[:1] + series[3:4], baseline=1)[1] == []  # half of 20 is 10
    assert watch(series, length_share=0.0) == [[]] * 5
    assert watch(series, length_share=0.0, length_floor=15.0)[3] == ["length"]


def test_length_past_both_bounds_fires_once():
    short = {"response/length_mean": 1.0}
    assert watch([{}, {}, {}, short], length_floor=5.0)[3] == ["length"]


def test_a_figure_that_is_nan_for_good_reasons_fires_nothing():
    assert watch([{"response/distinct_2": math.nan, "critic/explained_variance": math.nan}] * 2) == [[], []]


# ---------------------------------------------------------------- nan


@pytest.mark.parametrize("name", ["objective/scores", "policy/loss", "policy/grad_norm", "critic/loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(name, value):
    mine = Guards()
    mine.watch(ppo(), 1, SOUND)
    (fired,) = mine.watch(ppo(), 2, SOUND | {name: value})
    assert (fired.guard, fired.metric) == ("nan", name)
    assert mine.last["objective/scores"] == 1.0  # of the sound one
    assert list(mine.kept) == [0]


def test_gradients_that_were_not_finite_are_found_by_their_count():
    assert watch([{"policy/nonfinite": 0.0}, {"policy/nonfinite": 1.0}]) == [[], ["nan"]]


def test_an_iteration_without_answers_has_that_count_alone():
    mine = Guards()
    assert names(mine.watch(ppo(), 1, {"policy/nonfinite": 1.0})) == ["nan"]


# ---------------------------------------------------------------- hacking


def test_the_trend_by_hand():
    # S = 6, variance 4 * 3 * 13 / 18
    assert trend([1.0, 2.0, 3.0, 4.0]) == pytest.approx(5 / math.sqrt(156 / 18))
    assert trend([4.0, 3.0, 2.0, 1.0]) == pytest.approx(-5 / math.sqrt(156 / 18))
    assert trend([1.0, 3.0, 2.0]) == 0.0  # S = 1, and 1 is taken off
    assert trend([1.0, 1.0, 2.0]) == pytest.approx(1 / math.sqrt(66 / 18))  # S = 2
    assert trend([5.0] * 6) == 0.0
    assert trend([1e9, 1.0, 2.0, 3.0]) == 0.0  # S = 3 - 3


def inversions(n: int) -> list[int]:
    """How many orders of n values have k inversions (Mahonian numbers)."""
    counts = [1]
    for size in range(2, n + 1):
        counts = [
            sum(counts[k - j] for j in range(size) if 0 <= k - j < len(counts))
            for k in range(len(counts) + size - 1)
        ]
    return counts


def test_the_rate_that_the_schema_states_is_exact():
    """S = n (n - 1) / 2 - 2 * inversions, all orders of 10 values equally likely: z >= 2 means S >= 25."""
    counts = inversions(10)
    share = sum(count for k, count in enumerate(counts) if 45 - 2 * k >= 25) / sum(counts)
    assert share == pytest.approx(0.0143, abs=5e-5)
    assert 24 / math.sqrt(10 * 9 * 25 / 18) >= 2 > 22 / math.sqrt(10 * 9 * 25 / 18)


def hacked(scores, golds, **values) -> list[int]:
    """The iterations at which the guard fires."""
    series = [{"objective/scores": s, "objective/gold": g} for s, g in zip(scores, golds, strict=True)]
    return [step for step, found in enumerate(watch(series, **values), start=1) if "hacking" in found]


def test_a_score_that_rises_while_gold_falls_is_found_through_noise():
    draw = random.Random(0)
    up = [0.1 * i + draw.gauss(0, 0.1) for i in range(30)]
    gold = [0.5 + (0.1 * i if i < 10 else 1.0 - 0.05 * (i - 10)) + draw.gauss(0, 0.05) for i in range(30)]
    found = hacked(up, gold)
    assert found
    assert 14 <= found[0] <= 22  # gold falls from 11 on
    assert not hacked(up, up)
    assert not hacked([-x for x in up], [-x for x in up])
    assert not hacked([-x for x in up], up)  # gold rises


def test_the_first_window_can_fire_and_nothing_shorter():
    up, down = list(range(10)), list(range(10, 0, -1))
    assert hacked(up, down) == [10]
    assert hacked(up[:9], down[:9]) == []
    assert hacked(up, down, hacking_window=5, patience=2) == [5, 8]
    assert hacked(up, down, hacking_window=0) == []


def test_one_outlier_changes_nothing():
    up, down = [float(i) for i in range(10)], [10.0 - i for i in range(10)]
    up[4], down[6] = -1e6, 1e6
    assert hacked(up, down, hacking_z=1.5) == [10]


def test_flat_noise_gives_no_false_alarm_at_the_stated_rate():
    """Independent noise: 1.4 % of windows have each trend, so 2 of 10,000 have both; 20,000 windows: 4 expected."""
    draw = random.Random(1)
    alarms = sum(
        trend([draw.gauss(0, 1) for _ in range(10)]) >= 2
        and trend([draw.gauss(0, 1) for _ in range(10)]) <= -2
        for _ in range(20_000)
    )
    assert alarms <= 12  # P(more | 4.1) < 0.0004


def test_after_a_return_trends_begin_anew():
    mine, values = Guards(), ppo()
    for step in range(1, 10):
        mine.watch(values, step, SOUND | {"objective/scores": step, "objective/gold": -step})
    mine.returned(0)
    assert names(mine.watch(values, 10, SOUND | {"objective/scores": 10, "objective/gold": -10})) == []


# ---------------------------------------------------------------- the best adapter


def test_an_adapter_is_measured_by_the_answers_of_the_next_iteration():
    mine = Guards()
    for step, score in enumerate((0.0, 1.0, 5.0, 2.0, 3.0), start=1):
        mine.watch(ppo(), step, SOUND | {"objective/scores": score, "objective/kl": 10.0})
    # kl_coef .05: minus .5; kept after 2 and 4, and the start
    assert mine.kept == {0: -0.5, 2: 4.5, 4: 2.5}
    assert mine.best() == 2
    assert mine.worth == 2.5


def test_of_equals_the_earliest_and_of_nothing_none():
    assert Guards(kept={2: 1.0, 4: 1.0}).best() == 2
    assert Guards().best() is None


def test_gold_is_what_counts_where_there_is_one_and_a_name_beats_both():
    given = SOUND | {"objective/gold": 7.0}
    assert guards.worth(PPO(), given) == 7.0
    assert guards.worth(PPO(kl_coef=0.1), SOUND) == pytest.approx(0.8)
    assert guards.worth(PPO(best_metric="response/eos_rate"), given) == 0.8
    assert guards.worth_name(PPO(), gold=True) == "objective/gold"
    assert guards.worth_name(PPO(kl_coef=0.1), gold=False) == "objective/scores - 0.1 * objective/kl"


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(InputError, match=r"ppo.best_metric=objective/score is no metric.*objective/scores"):
        guards.worth(PPO(best_metric="objective/score"), SOUND)


# ---------------------------------------------------------------- checkpoints


def test_state_survives_json_bit_for_bit_and_goes_on_alike():
    draw = random.Random(3)
    series = [
        SOUND
        | {"objective/scores": draw.random() / 3 + i, "objective/gold": -i - draw.random() / 7}
        | {"response/empty_rate": draw.random()}
        for i in range(30)
    ]
    whole = Guards()
    expected = [whole.watch(ppo(patience=3), i, metrics) for i, metrics in enumerate(series, start=1)]
    half, found = Guards(), []
    for i, metrics in enumerate(series, start=1):
        half = Guards.from_dict(json.loads(json.dumps(half.to_dict(), allow_nan=False)))
        found.append(half.watch(ppo(patience=3), i, metrics))
    assert found == expected
    assert half == whole
    assert sum(map(len, found)) > 3


# ---------------------------------------------------------------- the config


def problems(**values) -> list[str]:
    run = schema.PPORun(stage="ppo")
    run.model.name, run.model.lora_targets = "m", ["q_proj"]
    run.dataset.name = run.dataset.family = "d"
    run.dataset.views = schema.Views("d", "d", "d")
    for name, value in values.items():
        setattr(run.ppo.guards if hasattr(run.ppo.guards, name) else run.ppo, name, value)
    return schema.problems(run)


def test_what_cannot_work_is_refused():
    assert problems(kl_action="raise_kl") == []
    for change in ({"kl_in": "loss", "kl_estimator": "k3"}, {"kl_coef": 0.0}):
        (line,) = problems(kl_action="raise_kl", **change)
        assert line.startswith("ppo.guards.kl_action=raise_kl raises the penalty in the reward")
    assert problems(hacking_window=3) == ["ppo.guards.hacking_window must be at least 4, or 0 for off, got 3"]
    (line,) = problems(kl_action="halt")
    assert "must be one of warn, raise_kl, lower_lr, rollback, stop" in line


def test_the_best_metric_is_known_before_anything_is_trained():
    for name in ("auto", "objective/kl", "response/eos_rate", "critic/loss"):
        assert problems(best_metric=name) == []
    (line,) = problems(best_metric="objective/score")
    assert line.startswith(
        "ppo.best_metric=objective/score is no metric of an iteration; did you mean objective/scores"
    )
    for name, made in (
        ("objective/gold", "reward_source.gold"),
        ("objective/ensemble_std", "reward_source.ensemble above 1"),
        ("ptx/loss", "ppo.ptx_coef above 0"),
        ("policy/kl_loss", "ppo.kl_in=loss"),
    ):
        (line,) = problems(best_metric=name)
        assert (
            line
            == f"ppo.best_metric={name} is a metric of runs with {made} only: set that, or choose another"
        )
    assert problems(best_metric="ptx/loss", ptx_coef=0.1) == []
    assert problems(best_metric="policy/kl_loss", kl_in="loss", kl_estimator="k3") == []
    (line,) = problems(best_metric="objective/part_1")
    assert "is no metric of an iteration" in line


def test_hacking_needs_a_gold_score():
    (line,) = problems(hacking_action="rollback")
    assert line.startswith(
        "ppo.guards.hacking_action=rollback is for a gold score that falls, which reward_source.gold"
    )


def test_the_page_names_what_has_to_be_a_number():
    page = (conf_dir().parent / "docs" / "guards.md").read_text(encoding="utf-8")
    section = page.partition("### nan and inf\n")[2].partition("\n## ")[0]
    assert "critic/grad_norm" in guards.SOUND
    assert [name for name in (*guards.SOUND, guards.BROKEN) if f"`{name}`" not in section] == []
