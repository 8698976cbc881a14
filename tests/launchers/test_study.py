"""The study: what is asked for, told and shown. Trials are functions; the database is a real one."""

from __future__ import annotations

import json
import time

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from rlhf_exp.sweeps import ledger, pruning
from tests.launchers.fakes import XY, bowl, points, run, stored, sweeper


def test_a_sweep_of_n_trials_in_batches(tmp_path, capsys):
    made = run(tmp_path / "s", n_trials=7, n_jobs=3, **{"sampler.seed": 1})
    assert [(first, len(batch)) for first, batch in made.launcher.launched] == [(0, 3), (3, 3), (6, 1)]
    trials = stored(tmp_path / "s")
    assert [trial.number for trial in trials] == list(range(7))
    # by the definition: the objective at the params, the best of them
    values = {t.number: -((t.params["x"] - 1) ** 2) - (t.params["y"] + 0.5) ** 2 for t in trials}
    assert [trial.value for trial in trials] == pytest.approx(list(values.values()))
    best = max(values, key=values.get)
    found = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    assert found["name"] == "optuna"
    assert found["best_trial"] == best
    assert found["best_value"] == pytest.approx(values[best])
    assert found["best_params"] == trials[best].params
    out = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(out) if line.split() == ["trial", "objective", "x", "y"])
    order = sorted(values, key=values.get, reverse=True)[:5]
    assert [int(line.split()[0]) for line in out[header + 1 : header + 6]] == order
    assert "7 trials (7 complete); objective maximized; the best 5:" in out


def test_a_batch_is_as_large_as_what_the_launcher_runs_at_once(tmp_path):
    made = sweeper(tmp_path / "s", bowl, n_trials=5)
    made.launcher.at_once = 4
    made.sweep(XY)
    assert [len(batch) for _, batch in made.launcher.launched] == [4, 1]


def test_the_search_finds_the_best_place(tmp_path):
    """A point drawn evenly has -4/3 - 1 - 4/3 - 1/4 = -3.9 on average; TPE's, after ten of those, much more."""
    run(tmp_path / "s", n_trials=24, **{"sampler.seed": 0})
    values = [trial.value for trial in stored(tmp_path / "s")]
    assert sum(values[14:]) / 10 > -2.0 > sum(values[:10]) / 10


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsgaii", "grid"])
def test_a_seed_gives_the_same_trials_however_often_it_is_interrupted(tmp_path, sampler):
    words = ["x=range(-2, 3)", "y=range(-2, 3)"] if sampler == "grid" else XY
    settings = {"sampler": sampler, "n_jobs": 2, "sampler.seed": 5}
    if sampler == "tpe":
        settings["sampler.n_startup_trials"] = 3
    if sampler == "nsgaii":
        settings["sampler.population_size"] = 4
    run(tmp_path / "a", words=words, n_trials=8, **settings)
    for n_trials in (2, 6, 8):  # each a process that ended
        run(tmp_path / "b", words=words, n_trials=n_trials, **settings)
    assert points(tmp_path / "a") == points(tmp_path / "b")
    run(tmp_path / "c", words=words, n_trials=4, **(settings | {"sampler.seed": 6}))
    assert points(tmp_path / "c") != points(tmp_path / "a")[:4]


def test_no_draw_comes_twice(tmp_path):
    """A sampler that is seeded anew by every process would begin at its first draw again."""
    for n_trials in (3, 6, 9):
        run(tmp_path / "s", n_trials=n_trials, sampler="random", **{"sampler.seed": 3})
    xs = [trial.params["x"] for trial in stored(tmp_path / "s")]
    assert len(set(xs)) == 9


def test_without_a_seed_one_is_drawn_and_kept(tmp_path):
    run(tmp_path / "a", n_trials=2, sampler="random")
    run(tmp_path / "b", n_trials=2, sampler="random")
    assert points(tmp_path / "a") != points(tmp_path / "b")
    seed = optuna.load_study(study_name="a", storage=f"sqlite:///{tmp_path / 'a' / 'study.db'}").user_attrs[
        "seed"
    ]
    run(tmp_path / "c", n_trials=2, sampler="random", **{"sampler.seed": seed})
    assert points(tmp_path / "a") == points(tmp_path / "c")


def test_a_grid_is_tried_once_each(tmp_path, capsys):
    run(
        tmp_path / "s",
        words=["a=choice(u,v)", "b=range(1,4)"],
        function=lambda n, p, f: {"objective": 1.0},
        sampler="grid",
    )
    assert sorted((t.params["a"], t.params["b"]) for t in stored(tmp_path / "s")) == [
        *(("u", 1), ("u", 2), ("u", 3)),
        *(("v", 1), ("v", 2), ("v", 3)),
    ]
    assert "Study.stop" not in capsys.readouterr().err


# ---------------------------------------------------------------- failures


def test_a_failed_trial_does_not_stop_the_study(tmp_path, capsys):
    def function(number, params, folder):
        if number in (1, 2):
            raise RuntimeError("out of luck\nand more")
        return {"objective": float("nan") if number == 3 else 1.0}

    run(tmp_path / "s", function, n_trials=6, n_jobs=2)
    states = [trial.state for trial in stored(tmp_path / "s")]
    fail, done = TrialState.FAIL, TrialState.COMPLETE
    assert states == [done, fail, fail, fail, done, done]
    reasons = [trial.user_attrs.get("reason") for trial in stored(tmp_path / "s")]
    assert reasons[1].startswith("out of luck") and reasons[3] == "reports no objective"
    assert "6 trials (3 complete, 3 failed)" in capsys.readouterr().out


def test_all_failed(tmp_path, capsys):
    def function(number, params, folder):
        raise RuntimeError("no")

    run(tmp_path / "s", function, n_trials=3)
    assert capsys.readouterr().out.splitlines()[-1] == "3 trials (3 failed); objective maximized"
    assert not (tmp_path / "s" / "optimization_results.yaml").exists()


def test_a_trial_that_is_interrupted_again_and_again_is_given_up(tmp_path):
    def function(number, params, folder):
        return (
            {"status": ledger.INTERRUPTED, "reason": "stopped by SIGTERM"}
            if number == 1
            else {"objective": 1.0}
        )

    made = run(tmp_path / "s", function, n_trials=3, n_jobs=2)
    assert [first for first, _ in made.launcher.launched] == [0, 1, 1]
    assert made.launcher.launched[1][1][0] == made.launcher.launched[0][1][1], "the same trial"
    states = [(trial.state, trial.user_attrs.get("reason")) for trial in stored(tmp_path / "s")]
    complete = (TrialState.COMPLETE, None)
    assert states == [complete, (TrialState.FAIL, "stopped by SIGTERM, 3 times"), complete]


# ---------------------------------------------------------------- several objectives


def dominates(first, second):
    """gold up, kl down."""
    return first != second and first[0] >= second[0] and first[1] <= second[1]


@pytest.mark.parametrize("sampler", ["motpe", "nsgaii", "random"])
def test_the_pareto_front_is_that_of_brute_force(tmp_path, sampler):
    def function(number, params, folder):  # more gold costs more KL, with a detour in y
        return {
            "gold": round(params["x"], 1),
            "kl": round(params["x"] ** 2 + abs(params["y"]), 1),
            "objective": 0.0,
        }

    settings = {"sampler.population_size": 5} if sampler == "nsgaii" else {}
    run(
        tmp_path / "s", function, ["x=interval(0, 2)", "y=interval(-1, 1)"], sampler=sampler,
        n_trials=25, objectives=["gold", "kl"], **settings, **{"sampler.seed": 2},
    )  # fmt: skip
    trials = stored(tmp_path / "s")
    values = {t.number: tuple(t.values) for t in trials}
    assert all(
        v == (round(t.params["x"], 1), round(t.params["x"] ** 2 + abs(t.params["y"]), 1))
        for t, v in zip(trials, values.values(), strict=True)
    )
    front = [n for n, v in values.items() if not any(dominates(other, v) for other in values.values())]
    found = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    assert sorted(one["trial"] for one in found["solutions"]) == sorted(front)
    assert all(tuple(one["values"]) == values[one["trial"]] for one in found["solutions"])
    assert 1 < len(front) < 25
    golds = [one["values"][0] for one in found["solutions"]]
    assert golds == sorted(golds, reverse=True)


def test_an_objective_by_the_name_of_a_metric(tmp_path):
    def function(number, params, folder):
        run = folder / "run"
        run.mkdir(parents=True)
        record = {"stage": "ppo", "key": "k", "metrics": {"last/length": 10.0 + number, "last/kl": 2.0}}
        (run / "run.json").write_text(json.dumps(record))
        return (
            {"objective": 1.0, "run": str(run)} if number else {"objective": 1.0, "run": str(folder / "gone")}
        )

    run(tmp_path / "s", function, n_trials=2, objectives=["last/length", "last/kl"])
    first, second = stored(tmp_path / "s")
    assert (first.state, first.user_attrs["reason"]) == (TrialState.FAIL, "reports no last/length")
    assert second.values == [11.0, 2.0]
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's' / 'study.db'}")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]


# ---------------------------------------------------------------- pruning


def climbing(number, params, folder):
    """Twenty values, each trial a little better; from trial 4 on hopeless, and slow after step 3."""
    worse = 10.0 if number >= 4 else 0.0
    for step in range(20):
        pruning.report_intermediate(step, step - worse + number * 0.01)
        deadline = time.monotonic() + (2.0 if number >= 4 and step >= 3 else 0.0)
        while not (reason := pruning.should_stop()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if reason:
            return {"status": ledger.STOPPED, "reason": reason}
    return {"objective": 19 - worse + number * 0.01}


def test_a_hopeless_trial_is_pruned_while_it_runs(tmp_path, capsys):
    run(
        tmp_path / "s", climbing, n_trials=6, pruner="median", poll_seconds=0.01,
        **{"pruner.n_startup_trials": 3, "pruner.n_warmup_steps": 1},
    )  # fmt: skip
    trials = stored(tmp_path / "s")
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4 + [TrialState.PRUNED] * 2
    for trial in trials[:4]:
        assert trial.intermediate_values == {step: step + trial.number * 0.01 for step in range(20)}
    for trial in trials[4:]:
        steps = sorted(trial.intermediate_values)
        assert steps == list(range(len(steps))) and 2 <= len(steps) < 20, "it ended early"
        # not before step 1: n_warmup_steps. The median of the others at step 1 is about 1, these have -8.96 and -8.95
        assert trial.user_attrs["reason"].startswith("pruned at step 1: -8.9")
        assert (tmp_path / "s" / str(trial.number) / "prune").read_text() == trial.user_attrs["reason"]
    assert "6 trials (4 complete, 2 stopped early)" in capsys.readouterr().out


def test_a_pruned_trial_is_not_run_again(tmp_path):
    settings = {"pruner": "median", "poll_seconds": 0.01, "pruner.n_startup_trials": 3}
    run(tmp_path / "s", climbing, n_trials=6, **settings)
    made = run(tmp_path / "s", climbing, n_trials=7, **settings)
    assert [first for first, _ in made.launcher.launched] == [6]


def test_without_a_pruner_nothing_is_pruned(tmp_path):
    run(tmp_path / "s", climbing, n_trials=5)
    assert all(trial.state == TrialState.COMPLETE for trial in stored(tmp_path / "s"))
    assert not list((tmp_path / "s").glob("*/prune"))
