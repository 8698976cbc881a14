"""The plots of a frontier report as SVG: every dot knows its figures (data-tip), every line its group (data-g).

Drawn here and not by matplotlib, whose dots have no names to hover. Colours are CSS variables (frontier.css); beyond
their number shapes tell groups apart. Coordinates are those of a WIDTH x HEIGHT view; the page scales it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rlhf_exp.evaluation import outcome
from rlhf_exp.evaluation.frontier import Fit, Point
from rlhf_exp.evaluation.frontier_lines import Line, Picture, Spot
from rlhf_exp.evaluation.markup import Content, Html, tag

WIDTH, HEIGHT = 540, 370
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
COLOURS, SHAPES = 8, 4
STEPS = 80  # pieces of a law's curve
FAR = 1.5  # times the last point's KL: a peak beyond it is not drawn
RINGS = 25  # more policies of a Pareto set have the steps alone
TICKS = (1, 2, 2.5, 5, 10)


class Scale:
    """From data to the view, and ticks at round values."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10 ** math.floor(math.log10(rough))
        step = next(s * power for s in TICKS if s * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


class RootScale(Scale):
    """By the square root, in which the law is written: what is near the start is not crowded there.

    An estimate below 0 is as far on the other side.
    """

    def __init__(self, low: float, high: float, start: float, end: float):
        super().__init__(root(low), root(high), start, end)
        self.most = high

    def __call__(self, value: float) -> float:
        return super().__call__(root(value))

    def ticks(self, most: int) -> list[float]:
        """0 and round values, from a fiftieth of the last on, each a `most`-th of the axis from the one before."""
        power = 10.0 ** math.floor(math.log10(self.most))
        found = [0.0]
        for value in [i * power / 10 for i in (1, 2, 5)] + [i * power for i in (1, 2, 3, 5, 7)]:
            far = root(value) - root(found[-1]) >= (self.high - self.low) / most
            if far and self.most / 50 <= value <= self.most:
                found.append(value)
        return found


def root(kl: float) -> float:
    return math.copysign(math.sqrt(abs(kl)), kl)


def scales(picture: Picture) -> tuple[RootScale, Scale]:
    """KL from 0 (or below, where an estimate is) to a little beyond the last point; scores with some air."""
    points = [point for line in picture.lines for _, run in line.members for point in run]
    lows = [b.low for line in picture.lines for b in line.bands] + [p.score for p in points]
    highs = [b.high for line in picture.lines for b in line.bands] + [p.score for p in points]
    right = 1.08 * max(0.0, *(p.kl for p in points)) or 1.0
    left = min(-0.0004 * right, *(p.kl for p in points))  # 2 % of the axis, by the root
    low, high = min(lows), max(highs)
    air = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    return (
        RootScale(left, right, LEFT, WIDTH - RIGHT),
        Scale(low - air, high + air, HEIGHT - BOTTOM, TOP),
    )


def svg(picture: Picture, name: str) -> Html:
    """The plot of a picture; ids start with `name`."""
    x, y = scales(picture)
    parts: list[Content] = [_clip(name), list(_axes(picture, x, y))]
    parts.append(tag("g", list(_staircase(picture.pareto, x, y)), clip_path=f"url(#{name}-clip)"))
    for line in picture.lines:
        drawn = [*_band(line, x, y), *_law(line, x, y), *_paths(line, x, y), *_dots(line, picture, x, y)]
        parts.append(
            tag("g", drawn, data_g=str(line.index), clip_path=f"url(#{name}-clip)", cls=_class(line.index))
        )
    rings = [_ring(spot, x, y) for spot in picture.pareto] if len(picture.pareto) <= RINGS else []
    parts.append(tag("g", rings, cls="rings"))
    about = f"{picture.label} against KL, {len(picture.lines)} lines; the tables below have the figures"
    return tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=about)


def _class(index: int) -> str:
    return f"c{index % COLOURS}"


def _clip(name: str) -> Html:
    box = tag(
        "rect",
        x=str(LEFT - 6),
        y=str(TOP - 6),
        width=str(WIDTH - LEFT - RIGHT + 12),
        height=str(HEIGHT - TOP - BOTTOM + 12),
    )
    return tag("defs", tag("clipPath", box, id=f"{name}-clip"))


def _axes(picture: Picture, x: RootScale, y: Scale) -> Iterator[Html]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    ticks = y.ticks(6)
    for tick in ticks:
        yield tag("line", cls="grid", x1=str(LEFT), x2=str(right), y1=str(y(tick)), y2=str(y(tick)))
        yield tag("text", _number(tick, ticks), x=str(LEFT - 8), y=str(y(tick) + 4), cls="left")
    yield tag("line", cls="axis", x1=str(LEFT), x2=str(right), y1=str(bottom), y2=str(bottom))
    for tick in x.ticks(12):
        yield tag("line", cls="axis", x1=str(x(tick)), x2=str(x(tick)), y1=str(bottom), y2=str(bottom + 4))
        yield tag("text", f"{tick:g}", x=str(x(tick)), y=str(bottom + 18), cls="middle")
    yield tag(
        "text",
        "KL from the start, nats an answer; spaced by √KL",
        x=str((LEFT + right) / 2),
        y=str(HEIGHT - 6),
        cls="middle",
    )


def _number(value: float, ticks: Sequence[float]) -> str:
    """As many decimals as tell neighbours apart."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, decimals + 1):
        decimals += 1
    return outcome.signed(outcome.write(value, f",.{min(decimals, 6)}f"))


def _staircase(spots: Sequence[Spot], x: RootScale, y: Scale) -> Iterator[Html]:
    """The best that was reached up to each KL."""
    if not spots:
        return
    path = [f"M{x(spots[0].point.kl)} {y(spots[0].point.score)}"]
    path += [f"H{x(spot.point.kl)}V{y(spot.point.score)}" for spot in spots[1:]]
    yield tag("path", d="".join(path) + f"H{WIDTH - RIGHT}", cls="staircase")


def _band(line: Line, x: RootScale, y: Scale) -> Iterator[Html]:
    if line.bands:
        there = [f"{x(b.kl)},{y(b.high)}" for b in line.bands]
        back = [f"{x(b.kl)},{y(b.low)}" for b in reversed(line.bands)]
        yield tag("polygon", points=" ".join(there + back), cls="band")


def _law(line: Line, x: RootScale, y: Scale) -> Iterator[Html]:
    """The law from the start to the end of the axis, and its peak where that is in the picture."""
    law = line.fit
    if not isinstance(law, Fit):
        return
    ends = math.sqrt(reach(line, x.most))
    # even in d = sqrt(KL), where the law is smooth
    curve = [(ends * i / STEPS) ** 2 for i in range(STEPS + 1)]
    yield tag("polyline", points=" ".join(f"{x(kl)},{y(law.at(kl))}" for kl in curve), cls="law")
    kl, score = law.peak
    if kl <= ends**2:
        px, py = x(kl), y(score)
        told = [
            f"{line.group.label}: peak of the fit",
            f"KL {kl:.3g}, d = {math.sqrt(kl):.3g}",
            f"score {score:.3g}",
        ]
        yield tag(
            "path",
            d=f"M{px} {py - 8}L{px + 6} {py}L{px} {py + 8}L{px - 6} {py}Z",
            cls="peak dot",
            data_tip=outcome.signed("\n".join(told)),
            data_x=str(px),
            data_y=str(py),
        )


def reach(line: Line, most: float) -> float:
    """The KL up to which a law is drawn: a little beyond its points, or beyond its peak if that is near."""
    last = max(point.kl for _, points in line.members for point in points)
    peak = line.fit.peak[0] if isinstance(line.fit, Fit) else 0.0
    return min(1.1 * max(last, peak if peak <= FAR * last else 0.0), most)


def _paths(line: Line, x: RootScale, y: Scale) -> Iterator[Html]:
    for path in line.paths:
        if len(path) > 1:
            points = " ".join(f"{x(p.kl)},{y(p.score)}" for p in path)
            yield tag("polyline", points=points, cls="line unfinished" if line.unfinished else "line")


def _dots(line: Line, picture: Picture, x: RootScale, y: Scale) -> Iterator[Html]:
    """Means over seeds large, each seed's points small; without seeds every point large."""
    shape = line.index // COLOURS % SHAPES
    if line.bands:
        for trial, points in line.members:
            for point in points:
                seed = trial.config.get("seed", "?")
                yield _dot(point, 2.4, 0, "dot seed", _tip(line, picture, point, f"seed {seed}"), x, y)
    for spot in line.spots:
        told = f"mean of {spot.seeds} seeds" if spot.seeds > 1 else ""
        yield _dot(spot.point, 4.6, shape, "dot", _tip(line, picture, spot.point, told), x, y)


def _tip(line: Line, picture: Picture, point: Point, told: str) -> str:
    """What hovering shows: lines of text."""
    error = f" ± {point.se:.3g}" if point.se is not None and math.isfinite(point.se) else ""
    step = "" if point.step is None else f"step {point.step:g}"
    where = ", ".join(dict.fromkeys(filter(None, [point.name, step, told])))
    most = "at most " if point.bound else ""
    figures = [f"{picture.label} {point.score:.4g}{error}", f"KL {most}{point.kl:.4g}"]
    return outcome.signed("\n".join([line.group.label, where, *figures]))


def _dot(point: Point, size: float, shape: int, kind: str, tip: str, x: RootScale, y: Scale) -> Html:
    px, py = x(point.kl), y(point.score)
    kind += " bound" * point.bound
    return mark(px, py, size, shape, cls=kind, data_tip=tip, data_x=str(px), data_y=str(py))


def mark(px: float, py: float, size: float, shape: int, **attributes: str) -> Html:
    """A circle, square, triangle or cross at a place of the view."""
    if shape == 0:
        return tag("circle", cx=str(px), cy=str(py), r=str(size), **attributes)
    s = size * 0.95
    d = {
        1: f"M{px - s} {py - s}h{2 * s}v{2 * s}h{-2 * s}Z",
        2: f"M{px} {py - 1.3 * s}L{px + 1.3 * s} {py + s}H{px - 1.3 * s}Z",
        3: f"M{px - s} {py}h{2 * s}M{px} {py - s}v{2 * s}",
    }[shape]
    return tag("path", d=d, **attributes | {"cls": attributes.get("cls", "") + " cross" * (shape == 3)})


def _ring(spot: Spot, x: RootScale, y: Scale) -> Html:
    return tag(
        "circle",
        cx=str(x(spot.point.kl)),
        cy=str(y(spot.point.score)),
        r="7.5",
        cls="ring",
        data_g=str(spot.line),
    )
