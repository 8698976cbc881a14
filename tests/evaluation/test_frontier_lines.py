"""From a small sweep, written by hand, to pictures and tables; what they must say was read off by eye."""

from __future__ import annotations

import csv
import io
import math

import pytest

from rlhf_exp.evaluation.comparison import Group, evaluated_on, groups
from rlhf_exp.evaluation.frontier import Fit, Point
from rlhf_exp.evaluation.frontier_lines import fitted, pictures
from rlhf_exp.evaluation.frontier_page import lead
from rlhf_exp.evaluation.frontier_sections import Report as Page
from rlhf_exp.evaluation.frontier_sections import best
from rlhf_exp.evaluation.frontier_sections import trials as sections_of_trials
from rlhf_exp.evaluation.frontier_tables import as_csv, tables
from rlhf_exp.evaluation.trials import HELDOUT, TRAINING, Row, Trial, read
from rlhf_exp.schema import Report
from rlhf_exp.store.listing import scan
from tests.evaluation.run_folders import held_out, write_eval, write_ppo, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep") / "outputs"
    write_sweep(root)
    return groups(read(scan(root))[0])


def drawn(sweep, **values):
    found = pictures(sweep, Report(**values))
    return {(picture.source, picture.objective): picture for picture in found}


def test_pictures_are_of_what_was_measured(sweep):
    assert list(drawn(sweep)) == [
        (HELDOUT, "gold"),
        (HELDOUT, "reward"),
        (HELDOUT, "win_rate"),
        (TRAINING, "gold"),
        (TRAINING, "reward"),
    ]
    assert drawn(sweep, objectives=["rougeL"]) == {}
    assert [p.label for p in pictures(sweep, Report(objectives=["length"]))] == ["length"]


def test_lines_are_groups_and_the_failed_run_has_none(sweep):
    picture = drawn(sweep)[HELDOUT, "gold"]
    assert [line.group.label for line in picture.lines] == ["kl_coef=0.02", "kl_coef=0.2"]
    training = drawn(sweep)[TRAINING, "gold"]
    assert [line.group.label for line in training.lines] == ["kl_coef=0.02", "kl_coef=0.2", "kl_coef=0.5"]
    assert [line.unfinished for line in training.lines] == [False, False, True]


def test_seeds_are_a_mean_and_a_band(sweep):
    """Gold of the two seeds: .1 .4 .7 .6 .3 and .2 .5 .9 .7 .4."""
    line = drawn(sweep)[HELDOUT, "gold"].lines[0]
    ((means),) = line.paths
    assert [p.score for p in means] == pytest.approx([0.15, 0.45, 0.8, 0.65, 0.35])
    assert [(b.low, b.high) for b in line.bands][2] == (0.7, 0.9)
    assert {spot.seeds for spot in line.spots} == {2}
    alone = drawn(sweep)[HELDOUT, "gold"].lines[1]
    assert (alone.bands, {s.seeds for s in alone.spots}, len(alone.paths[0])) == ([], {1}, 5)


def test_the_pareto_set_is_of_means(sweep):
    """Starts are at .15 (mean of two) and .1; then .25 at KL .25, .3 at .5, .375 at .75, .45 at 1, .8 at 4."""
    picture = drawn(sweep)[HELDOUT, "gold"]
    assert [(s.point.kl, round(s.point.score, 6)) for s in picture.pareto] == [
        (0, 0.15),
        (0.25, 0.25),
        (0.5, 0.3),
        (0.75, 0.375),
        (1, 0.45),
        (4, 0.8),
    ]


def test_best_under_each_limit(sweep):
    picture = drawn(sweep, kl_limits=[0.6, 1, 100])[HELDOUT, "gold"]
    assert [(limit, round(s.point.score, 6)) for limit, s in picture.best] == [
        (0.6, 0.3),
        (1, 0.45),
        (100, 0.8),
    ]


def test_without_a_policy_under_a_limit_there_is_no_best(tmp_path):
    write_ppo(tmp_path, [(3, 1, 1), (4, 1, 1)])
    found = groups(read(scan(tmp_path))[0])
    assert drawn(found, kl_limits=[1, 5])[TRAINING, "gold"].best[0] == (1, None)
    rows = tables(found, pictures(found, Report(kl_limits=[1.0, 5.0])), ["gold"])["best"]
    assert (rows[0]["kl_limit"], rows[0]["kl"], rows[0]["policy"]) == (1, None, None)


def test_the_start_that_all_share_is_there_once(tmp_path):
    for kl_coef in (0.1, 0.2, 0.3):
        ppo = write_ppo(tmp_path, [], ppo__kl_coef=kl_coef)
        write_eval(tmp_path, ppo, held_out([(0, 1, 0.5), (2 + kl_coef, 1, 0.4)]), started=30, seed=1)
    found = groups(read(scan(tmp_path))[0])
    assert len(drawn(found)[HELDOUT, "gold"].pareto) == 1


def test_an_average_is_a_point_on_no_line(tmp_path):
    ppo = write_ppo(tmp_path, [])
    write_eval(tmp_path, ppo, [(0, 0, {"gold": 0.0}), (8, 4, {"gold": 0.5}), (None, 3, {"gold": 0.75})])
    line = drawn(groups(read(scan(tmp_path))[0]))[HELDOUT, "gold"].lines[0]
    assert [p.score for p in line.paths[0]] == [0, 0.5]
    assert sorted(s.point.score for s in line.spots) == [0, 0.5, 0.75]


# ---------------------------------------------------------------- laws


def test_the_seeds_of_a_line_are_fitted_together_each_from_its_own_start():
    """Two seeds of d (2 - d / 4) that start at 1 and at 3: the same law, from 2 on average."""
    law = [(d, d * (2 - d / 4)) for d in (0, 1, 2, 3, 5)]
    runs = [[Point(d * d, start + gain, i) for i, (d, gain) in enumerate(law)] for start in (1, 3)]
    found = fitted(runs, "bon")
    assert (found.alpha, found.beta, found.start, found.points) == (
        pytest.approx(2),
        pytest.approx(0.25),
        2,
        8,
    )


def test_a_training_curve_has_no_known_start(sweep):
    """Its first batch is at KL 0, but one noisy sample of the start; it is of step 1, not 0."""
    law = drawn(sweep, fit="bon")[TRAINING, "gold"].lines[0].fit
    assert isinstance(law, Fit) and law.start_fitted
    known = drawn(sweep, fit="bon")[HELDOUT, "gold"].lines[0].fit
    assert isinstance(known, Fit) and (known.start, known.start_fitted) == (pytest.approx(0.15), False)


def test_no_law_where_none_was_asked_for_or_points_are_few(sweep):
    assert drawn(sweep, fit="none")[HELDOUT, "gold"].lines[0].fit == "no law was asked for (report.fit=none)"
    assert drawn(sweep)[TRAINING, "gold"].lines[2].fit.startswith("not fitted: 1 points")


# ---------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def made(sweep):
    report = Report(fit="bon", kl_limits=[1.0])
    return tables(sweep, pictures(sweep, report), report.objectives)


def test_every_run_is_in_the_table_of_trials(made):
    rows = {row["run"]: row for row in made["trials"]}
    assert sorted(row["state"] for row in rows.values()) == [
        "FAILED",
        "FINISHED",
        "FINISHED",
        "FINISHED",
        "KILLED",
    ]
    failed = next(row for row in rows.values() if row["state"] == "FAILED")
    assert failed["reason"] == "ValueError: <b>the loss is nan</b>"
    assert failed["training_kl"] is None
    first = next(row for row in rows.values() if row["group"] == "kl_coef=0.02" and row["seed"] == 0)
    assert (first["training_step"], first["training_kl"], first["training_gold"]) == (5, 16, 0.3)
    assert (first["heldout_step"], first["heldout_win_rate"], first["training_win_rate"]) == (40, 0.575, None)


def test_only_keys_that_differ_are_in_the_table_of_configs(made):
    assert set(made["config"][0]) == {"group", "run", "ppo.kl_coef"}
    assert sorted(row["ppo.kl_coef"] for row in made["config"]) == ["0", "0.02", "0.02", "0.2", "0.5"]


def test_every_point_of_every_seed_is_in_the_table_of_points(made):
    rows = [row for row in made["points"] if (row["source"], row["objective"]) == (HELDOUT, "gold")]
    assert len(rows) == 15
    assert {(row["seed"], row["kl"], row["score"], row["se"]) for row in rows} >= {
        (0, 16, 0.3, 0.05),
        (1, 16, 0.4, 0.05),
    }


def test_the_table_of_laws_has_the_peak_or_the_reason(made):
    rows = [row for row in made["fits"] if row["source"] == HELDOUT and row["objective"] == "gold"]
    law = rows[0]
    assert law["peak_d"] == pytest.approx(law["alpha"] / (2 * law["beta"]))
    assert law["peak_kl"] == pytest.approx(law["peak_d"] ** 2)
    assert law["peak_score"] == pytest.approx(law["start"] + law["alpha"] ** 2 / (4 * law["beta"]))
    training = [row for row in made["fits"] if row["source"] == TRAINING and row["group"] == "kl_coef=0.5"]
    assert all(row["alpha"] is None and row["note"].startswith("not fitted: 1 points") for row in training)


def test_a_peak_beyond_what_was_measured_is_noted(tmp_path):
    points = [(d * d, 0, d * (2 - d / 4)) for d in (0, 0.5, 1, 1.5, 2)]
    write_eval(tmp_path, write_ppo(tmp_path, []), held_out(points))
    found = groups(read(scan(tmp_path))[0])
    report = Report(fit="bon", objectives=["gold"])
    (row,) = tables(found, pictures(found, report), report.objectives)["fits"]
    assert (row["peak_kl"], row["note"]) == (pytest.approx(16), "beyond the highest KL, 4")


def test_csv_reads_back(made):
    for name, rows in made.items():
        back = list(csv.DictReader(io.StringIO(as_csv(rows))))
        assert len(back) == len(rows), name
        for line, row in zip(back, rows, strict=True):
            for key, value in row.items():
                if isinstance(value, float) and not isinstance(value, bool):
                    assert float(line[key]) == value or math.isnan(value)


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1+2", "@x", "\tx"])
def test_a_text_is_no_formula_of_a_spreadsheet(text):
    assert as_csv([{"a": text, "b": -1.5}]).splitlines()[1].startswith(("'", "\"'"))
    assert as_csv([{"a": text, "b": -1.5}]).endswith(",-1.5\n")


# ---------------------------------------------------------------- best of n


def of_best(seed: int, scores: dict[int, float]) -> Trial:
    """An evaluation's best-of-n: (n: score), at the KL that is log n - (n - 1) / n."""
    rows = [Row("sft", 0.0, {"kl": 0.0, "gold": 0.0})]
    for n, score in scores.items():
        kl = math.log(n) - (n - 1) / n
        rows.append(Row(f"sft:best_of_{n}", float(n), {"kl": kl, "gold": score}, bound=True))
    found = Trial(f"eval/{seed}:sft:best_of", "eval", str(seed), "FINISHED", str(seed), config={"seed": seed})
    found.rows[HELDOUT] = rows
    return found


def test_seeds_of_best_of_n_are_one_line_whose_kl_is_a_bound():
    trials = [of_best(0, {2: 0.2, 4: 0.4, 8: 0.5, 16: 0.55}), of_best(1, {2: 0.3, 4: 0.4, 8: 0.6, 16: 0.65})]
    (picture,) = pictures([Group("best", trials)], Report(objectives=["gold"], fit="rl"))
    (line,) = picture.lines
    assert [(p.name, p.bound) for p in line.paths[0]] == [
        ("step 0", False),
        *((f"sft:best_of_{n}", True) for n in (2, 4, 8, 16)),
    ]
    assert [p.score for p in line.paths[0]] == pytest.approx([0, 0.25, 0.4, 0.55, 0.6])
    assert line.fit.form == "bon", "its law is another than that of RL, whatever is asked for"
    assert [spot.point.name for spot in picture.pareto][-1] == "sft:best_of_16"


def test_the_first_sentence_says_where_a_kl_is_a_bound_and_on_which_prompts():
    """log 4 - 3/4 = 0.636, log 2 - 1/2 = 0.193; randomwalks are evaluated on the prompts of training."""
    trial = of_best(0, {2: 0.25, 4: 0.5})
    groups = [Group("best", [trial])]
    settings = Report(objectives=["gold"], kl_limits=[0.5])

    def said() -> str:
        return lead(Page("", groups, pictures(groups, settings), {}, [], {}, "rl"))

    assert said() == (
        "On held-out prompts the highest gold score is 0.5, of best (sft:best_of_4) at a KL of at most 0.636. With a "
        "KL of at most 0.5 it is 0.25, of best (sft:best_of_2) at a KL of at most 0.193."
    )
    trial.evaluation = {"dataset.evaluate_on": "validation"}
    assert said().startswith("On validation prompts the highest gold score is 0.5")
    trial.evaluation = {"dataset.evaluate_on": "train"}
    assert said().startswith("On evaluated training prompts the highest gold score is 0.5")
    assert evaluated_on([trial, of_best(1, {2: 0.5})]) == "evaluated prompts"
    page = Page("", groups, pictures(groups, settings), {}, [], {}, "rl")
    assert page.said(HELDOUT) == "Evaluated training prompts"
    drawn = "".join(tag for section in (best, sections_of_trials) for tag in section(page))
    assert "KL (evaluated)" in drawn and "eld-out" not in drawn


def test_no_law_is_drawn_where_none_is_asked_for():
    (picture,) = pictures(
        [Group("best", [of_best(0, {2: 0.2, 4: 0.4, 8: 0.5, 16: 0.55})])],
        Report(objectives=["gold"], fit="none"),
    )
    assert isinstance(picture.lines[0].fit, str)


def test_a_bound_is_of_the_kl_and_of_no_other_axis():
    trial = of_best(0, {2: 0.2})
    for row in trial.rows[HELDOUT]:
        row.metrics["length"] = 5.0
    (picture,) = pictures([Group("best", [trial])], Report(objectives=["gold"], kl="length"))
    assert not any(p.bound for _, points in picture.lines[0].members for p in points)
