"""The frontier of score against KL, as mathematics: Pareto set, best under a limit, over-optimisation fit, bands.

Pure functions of points; KL in nats an answer, from the policy that training began at. The law is that of Gao et al.
2022 (Scaling laws for reward model overoptimization, arXiv:2210.10760, section 1), with d = sqrt(KL):

    best-of-n   R(d) = d (alpha - beta d)
    RL          R(d) = d (alpha - beta log d)

Both count R from the start: R(0) = 0. They are linear in alpha and beta, so least squares has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

LEAST = 4  # points, below which nothing is fitted; one more where the start is fitted too
FORMS = ("rl", "bon")
_SAME = 1e-12  # share of a column's square that is left when two columns are one


class Point(NamedTuple):
    """A policy: how far from the start, how good. step: its place on its line; None: an average, on none.

    bound: the KL is no more than this, as that of best-of-n.
    """

    kl: float
    score: float
    step: float | None = None
    name: str = ""
    se: float | None = None  # standard error of the score
    bound: bool = False


class Band(NamedTuple):
    """Several seeds at one step: means, and from where to where the score goes."""

    step: float
    kl: float
    score: float
    low: float
    high: float
    seeds: int
    name: str = ""  # where all seeds' policies have one
    bound: bool = False


class Fit(NamedTuple):
    """R(KL) = start + d (alpha - beta d) for bon, start + d (alpha - beta log d) for rl; beta > 0."""

    form: str
    alpha: float
    beta: float
    start: float  # the score at KL 0
    start_fitted: bool
    r2: float  # share of the variance around the mean that the law explains; nan where there is none
    points: int

    def at(self, kl: float) -> float:
        """The score that the law gives at a KL of 0 or more."""
        d = math.sqrt(kl)
        if d == 0:
            return self.start
        return self.start + d * (self.alpha - self.beta * (d if self.form == "bon" else math.log(d)))

    @property
    def peak(self) -> tuple[float, float]:
        """(KL, score) where the law is highest: dR/dd = 0.

        bon: alpha - 2 beta d = 0, d = alpha / (2 beta), and 0 where alpha <= 0: it falls from the start.
        rl: alpha - beta log d - beta = 0, d = exp(alpha / beta - 1), where R = beta d. (inf, inf) beyond the doubles.
        """
        if self.form == "bon":
            d = max(self.alpha / (2 * self.beta), 0.0)
            return d * d, self.start + d * (self.alpha - self.beta * d)
        try:
            d = math.exp(self.alpha / self.beta - 1)
            return d * d, self.start + self.beta * d
        except OverflowError:
            return math.inf, math.inf


def finite(points: Iterable[Point]) -> list[Point]:
    """Those with a KL and a score that are finite numbers."""
    return [point for point in points if math.isfinite(point.kl) and math.isfinite(point.score)]


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other dominates, by KL.

    One dominates another if its KL is no higher and its score no lower, and one of the two is better. Equal points
    do not dominate each other: all stay. Points that are not finite are left out.
    """
    kept: list[Point] = []
    for point in sorted(finite(points), key=lambda p: (p.kl, -p.score)):
        if not kept or point.score > kept[-1].score or point[:2] == kept[-1][:2]:
            kept.append(point)
    return kept


def best_under(points: Iterable[Point], limit: float) -> Point | None:
    """The highest score at a KL of at most `limit`; of equals that of the lowest KL; None where there is no point."""
    within = [point for point in finite(points) if point.kl <= limit]
    return min(within, key=lambda p: (-p.score, p.kl), default=None)


def fit(points: Iterable[Point], form: str, start: float | None = None) -> Fit | str:
    """alpha and beta by least squares; or, in a sentence, why there are none.

    start: the score at KL 0 where it was measured; None: a third coefficient. Points that are not finite, or at a KL
    of 0 or less (where the law says nothing of alpha and beta; an estimated KL may be below 0), do not count.
    Raises ValueError for a form that is not one of FORMS.
    """
    if form not in FORMS:
        raise ValueError(f"a form is one of {', '.join(FORMS)}, got {form}")
    used = [point for point in finite(points) if point.kl > 0]
    least = LEAST + (start is None)
    if len(used) < least:
        unknown = ", and the score at KL 0 is not known" if start is None else ""
        return f"not fitted: {len(used)} points with a KL above 0, it takes {least}{unknown}"
    d = [math.sqrt(point.kl) for point in used]
    first, second = d, [-x * (x if form == "bon" else math.log(x)) for x in d]
    gains = [point.score - (start or 0.0) for point in used]
    # with an unknown start: the means are taken off, which leaves alpha and beta as they are (Frisch & Waugh 1933)
    columns = [first, second, gains] if start is not None else [_centred(c) for c in (first, second, gains)]
    found = _two_coefficients(*columns)
    if found is None:
        return "not fitted: the points lie at too few different KLs to tell alpha from beta"
    alpha, beta = found
    if not beta > 0:
        return f"not fitted: beta = {beta:.3g} is not above 0, the score does not turn within these points"
    if start is None:
        offset = (sum(gains) - alpha * sum(first) - beta * sum(second)) / len(used)
        law = Fit(form, alpha, beta, offset, True, math.nan, len(used))
    else:
        law = Fit(form, alpha, beta, start, False, math.nan, len(used))
    return law._replace(r2=_explained(law, used))


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _two_coefficients(
    a: Sequence[float], b: Sequence[float], y: Sequence[float]
) -> tuple[float, float] | None:
    """(alpha, beta) of the least |y - alpha a - beta b|, by Gram-Schmidt; None where a and b are one direction."""
    aa, bb = _dot(a, a), _dot(b, b)
    if aa == 0 or bb == 0:
        return None
    share = _dot(a, b) / aa
    rest = [x - share * z for x, z in zip(b, a, strict=True)]
    square = _dot(rest, rest)
    if square <= _SAME * bb:
        return None
    beta = _dot(rest, y) / square
    return _dot(a, y) / aa - share * beta, beta


def _explained(law: Fit, points: Sequence[Point]) -> float:
    scores = [point.score for point in points]
    total = math.fsum(x * x for x in _centred(scores))
    left = math.fsum((point.score - law.at(point.kl)) ** 2 for point in points)
    return 1 - left / total if total > 0 else math.nan


def bands(runs: Sequence[Iterable[Point]], width: str = "range") -> list[Band]:
    """Runs that differ only by seed, at the steps that all of them have a finite point for; in order of the steps.

    width: range, from the lowest to the highest score; se, mean +- s / sqrt(n), s with n - 1 in the denominator. A
    single run has neither: no bands. Raises ValueError for another width.
    """
    if width not in ("range", "se"):
        raise ValueError(f"a band is range or se, got {width}")
    # the start apart: ilql's decoding by beta = 0 is at step 0 too
    by_step = [{(p.step, p.step == 0 == p.kl): p for p in finite(run) if p.step is not None} for run in runs]
    if len(by_step) < 2:
        return []
    found = []
    for place in sorted(set.intersection(*map(set, by_step)), key=lambda place: (place[0], not place[1])):
        step, here = place[0], [run[place] for run in by_step]
        kl, score = (sum(values) / len(here) for values in zip(*(p[:2] for p in here), strict=True))
        low, high = min(p.score for p in here), max(p.score for p in here)
        if width == "se":
            half = math.sqrt(math.fsum((p.score - score) ** 2 for p in here) / (len(here) - 1) / len(here))
            low, high = score - half, score + half
        names = {p.name for p in here}
        name = names.pop() if len(names) == 1 else ""
        found.append(Band(step, kl, score, low, high, len(here), name, any(p.bound for p in here)))
    return found


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: each the mean of some that follow one another, named for the last of them.

    Single batches are noisy, and the best of many noisy ones is best by luck. The first is kept by itself: no update
    had been made there. Points that are not finite are left out.
    """
    points = finite(points)
    if len(points) <= most:
        return points
    first, rest = points[0], points[1:]
    size = math.ceil(len(rest) / max(most - 1, 1))
    blocks = [rest[i : i + size] for i in range(0, len(rest), size)]
    return [first] + [
        block[-1]._replace(
            kl=sum(p.kl for p in block) / len(block), score=sum(p.score for p in block) / len(block)
        )
        for block in blocks
    ]


Item = TypeVar("Item")


def by(items: Iterable[Item], key: Callable[[Item], object]) -> Mapping[object, list[Item]]:
    """Items of one key together, keys and items in the order of their coming."""
    found: dict[object, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
