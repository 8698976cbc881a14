"""Pareto set, best under a limit, laws and bands: numbers by hand, the definitions, another library."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rlhf_exp.evaluation.frontier import Fit, Point, bands, best_under, finite, fit, pareto, thinned

# coarse values, so that ties in one and in both coordinates come often
POINTS = st.lists(st.builds(Point, st.integers(0, 6).map(float), st.integers(-3, 3).map(float)), max_size=12)
BAD = (math.nan, math.inf, -math.inf)


def dominates(a: Point, b: Point) -> bool:
    """The definition."""
    return a.kl <= b.kl and a.score >= b.score and (a.kl < b.kl or a.score > b.score)


def law(form: str, d: float, alpha: float, beta: float) -> float:
    """Gao et al. 2022, as they write it."""
    return d * (alpha - beta * d) if form == "bon" else d * (alpha - beta * math.log(d))


# ---------------------------------------------------------------- Pareto set


def test_pareto_by_hand():
    a, b, c, d, e = Point(0, 0.1), Point(2, 0.5), Point(3, 0.4), Point(5, 0.9), Point(9, 0.9)
    assert pareto([d, c, a, e, b]) == [a, b, d]  # c has more KL and less score than b, e more KL than d


def test_equal_points_all_stay_and_a_tie_in_one_coordinate_does_not():
    same, twin, worse, further = Point(1, 1, 1), Point(1, 1, 2), Point(1, 0.5), Point(2, 1)
    assert pareto([worse, twin, further, same]) == [twin, same]


def test_of_nothing_comes_nothing():
    assert pareto([]) == []
    assert best_under([], 5) is None


@given(POINTS)
def test_no_point_of_the_set_is_dominated_and_each_left_out_is(points):
    kept = pareto(points)
    assert all(not dominates(other, point) for point in kept for other in points)
    left = [point for point in points if not any(point is k for k in kept)]
    assert all(any(dominates(k, point) for k in kept) for point in left)


@given(POINTS)
def test_the_set_is_ordered_and_its_own_set(points):
    kept = pareto(points)
    assert [p.kl for p in kept] == sorted(p.kl for p in kept)
    assert [p.score for p in kept] == sorted(p.score for p in kept)
    assert pareto(kept) == kept


@pytest.mark.parametrize("bad", BAD)
def test_points_that_are_not_finite_are_in_nothing(bad):
    good = Point(4, 1)
    points = [Point(bad, 9), Point(0, bad), good]
    assert finite(points) == pareto(points) == [good]
    assert best_under(points, 10) == good


# ---------------------------------------------------------------- best under a limit


def test_best_under_by_hand():
    points = [Point(0, 0.1), Point(2, 0.5), Point(3, 0.5), Point(5, 0.9)]
    chosen = [best_under(points, limit) for limit in (-1, 0, 1.9, 2, 4, 5, 100)]
    assert chosen == [None, points[0], points[0], points[1], points[1], points[3], points[3]]


@given(POINTS, st.integers(0, 6))
def test_the_best_under_a_limit_is_in_the_pareto_set(points, limit):
    best = best_under(points, limit)
    assert (best is None) == all(p.kl > limit for p in points)
    if best is not None:
        assert best.kl <= limit
        assert best.score == max(p.score for p in points if p.kl <= limit)
        assert best[:2] in [p[:2] for p in pareto(points)]


# ---------------------------------------------------------------- laws


def test_a_law_by_hand():
    """R = d (2 - d / 4): at d = 1, 2, 4, 6 it is 1.75, 3, 4, 3, highest at d = 4, KL 16."""
    points = [Point(1, 1.75), Point(4, 3), Point(16, 4), Point(36, 3)]
    found = fit(points, "bon", start=0)
    assert (found.alpha, found.beta, found.start, found.start_fitted, found.points) == (
        pytest.approx(2),
        pytest.approx(0.25),
        0,
        False,
        4,
    )
    assert found.peak == (pytest.approx(16), pytest.approx(4))
    assert found.r2 == pytest.approx(1)


def test_the_rl_law_by_hand():
    """R = d (1 - log d / 2): at d = e, e^2, e^3 it is e / 2, 0, -e^3 / 2, highest at d = e, where R = e / 2."""
    e = math.e
    points = [Point(1, 1), Point(e**2, e / 2), Point(e**4, 0), Point(e**6, -(e**3) / 2)]
    found = fit(points, "rl", start=0)
    assert (found.alpha, found.beta) == (pytest.approx(1), pytest.approx(0.5))
    assert found.peak == (pytest.approx(e**2), pytest.approx(e / 2))


def test_the_peak_of_a_score_that_only_falls_is_the_start():
    assert Fit("bon", -1.0, 2.0, 0.5, False, 1.0, 4).peak == (0, 0.5)


def test_a_peak_beyond_the_doubles_is_infinite():
    assert Fit("rl", 1.0, 1e-6, 0.0, False, 1.0, 4).peak == (math.inf, math.inf)


def test_the_law_at_the_start():
    for form in ("rl", "bon"):
        assert Fit(form, 3.0, 2.0, 0.75, False, 1.0, 4).at(0) == 0.75


SOUND = {
    "alpha": st.floats(-5, 5),
    "beta": st.floats(0.05, 5),
    "start": st.floats(-3, 3),
    "steps": st.lists(st.integers(1, 80), min_size=5, max_size=12, unique=True),
    "form": st.sampled_from(["rl", "bon"]),
}


@given(**SOUND, known=st.booleans())
def test_alpha_and_beta_come_back_from_points_without_noise(alpha, beta, start, steps, form, known):
    d = [step / 8 for step in steps]
    points = [Point(x * x, start + law(form, x, alpha, beta)) for x in d]
    found = fit(points, form, start if known else None)
    assert found.alpha == pytest.approx(alpha, abs=1e-6)
    assert found.beta == pytest.approx(beta, abs=1e-6)
    assert found.start == pytest.approx(start, abs=1e-6)
    assert found.start_fitted is not known
    assert [found.at(p.kl) for p in points] == pytest.approx([p.score for p in points], abs=1e-6)


@given(**SOUND, noise=st.lists(st.floats(-0.5, 0.5), min_size=12, max_size=12), known=st.booleans())
def test_numpys_least_squares_finds_the_same(alpha, beta, start, steps, form, noise, known):
    d = np.array([step / 8 for step in steps])
    y = np.array([start + law(form, x, alpha, beta) + e for x, e in zip(d, noise, strict=False)])
    columns = [d, -d * (d if form == "bon" else np.log(d))] + ([] if known else [np.ones_like(d)])
    expected = np.linalg.lstsq(np.stack(columns, 1), y - (start if known else 0), rcond=None)[0]
    found = fit([Point(x * x, score) for x, score in zip(d, y, strict=True)], form, start if known else None)
    if isinstance(found, str):
        assert expected[1] <= 1e-9
        return
    assert [found.alpha, found.beta] == pytest.approx(list(expected[:2]), rel=1e-5, abs=1e-6)
    if not known:
        assert found.start == pytest.approx(expected[2], rel=1e-5, abs=1e-5)


@given(**{k: SOUND[k] for k in ("alpha", "beta", "form")})
def test_no_neighbour_of_the_peak_is_higher(alpha, beta, form):
    found = Fit(form, alpha, beta, 0.0, False, 1.0, 4)
    kl, score = found.peak
    assume(1e-4 < kl < 1e8)
    assert found.at(kl) == pytest.approx(score)
    assert all(found.at(kl * near) <= score + 1e-9 * abs(score) for near in (0.5, 0.9, 1.1, 2))


def test_the_share_explained_by_hand():
    """R = d - d^2 / 4 at KL 1, 4, 9, 16: .75, 1, .75, 0. With errors +.1, -.1: the definition, by numpy."""
    d = np.array([1.0, 2.0, 3.0, 4.0])
    y = np.array([0.85, 0.9, 0.75, 0.0])
    found = fit([Point(x * x, s) for x, s in zip(d, y, strict=True)], "bon", start=0)
    fitted = found.alpha * d - found.beta * d**2
    assert found.r2 == pytest.approx(1 - ((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert 0.9 < found.r2 < 1


def test_too_few_points_have_no_law():
    points = [Point(1, 1.75), Point(4, 3), Point(16, 4)]
    nothing = [Point(0, 0), Point(-0.1, 1), Point(math.nan, 1), Point(9, math.inf)]
    assert fit(points + nothing, "bon", start=0) == "not fitted: 3 points with a KL above 0, it takes 4"
    four = [*points, Point(36, 3)]
    assert isinstance(fit(four, "bon", start=0), Fit)
    assert fit(four, "bon") == (
        "not fitted: 4 points with a KL above 0, it takes 5, and the score at KL 0 is not known"
    )


@pytest.mark.parametrize("form", ["rl", "bon"])
def test_a_score_that_only_rises_has_no_law(form):
    points = [Point(x * x, x + 0.1 * x * (x if form == "bon" else math.log(x))) for x in (1, 2, 3, 4)]
    assert fit(points, form, start=0) == (
        "not fitted: beta = -0.1 is not above 0, the score does not turn within these points"
    )


def test_one_kl_cannot_tell_alpha_from_beta():
    for form, start in product(("rl", "bon"), (0.0, None)):
        said = fit([Point(4, s) for s in (1, 2, 3, 4, 5)], form, start)
        assert said == "not fitted: the points lie at too few different KLs to tell alpha from beta"


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="a form is one of rl, bon, got cubic"):
        fit([], "cubic")


# ---------------------------------------------------------------- seeds


RUNS = [
    [Point(1, 0.2, 10), Point(3, 0.5, 20), Point(6, 0.4, 30)],
    [Point(2, 0.4, 10), Point(5, 0.8, 20)],
    [Point(3, 0.9, 10), Point(4, 0.5, 20), Point(9, 0.1, 30), Point(9, 0.1, None)],
]


def test_bands_by_hand():
    found = bands(RUNS)
    assert [b[:6] for b in found] == [
        (10, 2, pytest.approx(0.5), 0.2, 0.9, 3),
        (20, 4, pytest.approx(0.6), 0.5, 0.8, 3),
    ], "step 30 is not of all seeds"


def test_standard_errors_by_hand():
    """At step 10: .2, .4, .9 with mean .5; s^2 = (.09 + .01 + .16) / 2 = .13; s / sqrt 3 = .20817."""
    first = bands(RUNS, "se")[0]
    assert first.low == pytest.approx(0.5 - math.sqrt(0.13 / 3))
    assert first.high == pytest.approx(0.5 + math.sqrt(0.13 / 3))


def test_one_seed_and_no_shared_step_have_no_band():
    assert bands(RUNS[:1]) == bands([]) == []
    assert bands([[Point(1, 1, 1)], [Point(1, 1, 2)]]) == []
    assert bands([[Point(1, 1, 1)], [Point(1, math.nan, 1)]]) == []
    with pytest.raises(ValueError, match="a band is range or se, got wide"):
        bands(RUNS, "wide")


# ---------------------------------------------------------------- thinning


def test_a_long_curve_becomes_means_of_steps_that_follow():
    points = [Point(float(i), 10.0 * i, i, f"step {i}") for i in range(1, 8)]
    found = thinned(points, 3)
    # the first alone, then (2, 3, 4) and (5, 6, 7)
    assert found == [points[0], Point(3, 30, 4, "step 4"), Point(6, 60, 7, "step 7")]
    assert thinned(points, 7) == points


@given(st.integers(0, 60), st.integers(2, 25))
def test_thinning_keeps_the_ends_and_the_number(count, most):
    points = [Point(i, i, i) for i in range(count)]
    found = thinned(points, most)
    assert len(found) == count if count <= most else len(found) <= most
    assert not count or (found[0] == points[0] and found[-1].step == count - 1)
