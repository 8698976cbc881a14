"""What the report's figures show: panels, each with one idea. render.py makes images of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_exp.evaluation import outcome
from rlhf_exp.evaluation.labels import place
from rlhf_exp.evaluation.render import THEME, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH_FROM = 20  # points from which a moving average is drawn over the raw line


class Curve(NamedTuple):
    key: str
    title: str
    unit: str
    colour: str = "plain"
    target: float | None = None  # a value to compare with, drawn as a thin line
    floor: float | None = None  # the axis begins here at the latest
    spec: str = ".3g"


TRAINING = (
    Curve("objective/scores", "Reward", "mean score of a batch", "reward"),
    Curve("objective/gold", "Gold score", "mean of a batch, not trained on", "gold"),
    Curve("objective/kl", "KL", "from the reference, nats an answer", floor=0),
    Curve("response/length_mean", "Answer length", "tokens"),
    Curve("objective/entropy", "Entropy", "nats a token"),
    Curve("response/eos_rate", "Ended by themselves", "share of answers"),
    Curve("response/distinct_2", "Distinct-2", "different pairs of neighbours, share"),
    Curve("response/empty_rate", "Empty answers", "share of answers", floor=0),
)
OPTIMISER = (
    Curve("policy/approxkl", "Step size", "approximate KL of an update, nats a token", floor=0),
    Curve("policy/clipfrac", "Clipped", "share of tokens at the ratio's bound", floor=0),
    Curve("policy/ratio_mean", "Probability ratio", "mean, new over old policy", target=1, spec=".3f"),
    Curve("policy/grad_norm", "Gradient norm", "before clipping", floor=0),
    Curve("critic/loss", "Value loss", "critic, half squared error", floor=0),
    Curve(
        "critic/explained_variance", "Explained variance", "critic; 1 is perfect, 0 is a constant", target=0
    ),
)


def curve_panels(rows: Sequence[Mapping[str, Any]], curves: Sequence[Curve], most: int = 6) -> list[Panel]:
    """The first `most` of `curves` that the rows of metrics.jsonl have a finite value for."""
    panels = []
    for curve in curves:
        points = [
            (row["step"], value) for row in rows if (value := outcome.number(row, curve.key)) is not None
        ]
        sound = sorted(point for point in points if math.isfinite(point[1]))
        if lost := len(points) - len(sound):
            curve = curve._replace(unit=f"{curve.unit} ({lost} not finite)")
        if sound:
            panels.append(_curve_panel(curve, *map(np.array, zip(*sound, strict=True))))
    return panels[:most]


def frontier_panels(found: Sequence[outcome.Policy], prompts: str = outcome.HELD_OUT) -> list[Panel]:
    """Gold score and reward (those that were measured) against KL, a point a policy; prompts: which they answered."""
    panels, start = [], outcome.baseline(found)
    for key in ("gold", "reward"):
        points = [_Point.of(policy, key, outcome.by_step(policy, found)) for policy in found]
        points = [point for point in points if point is not None]
        if points:
            metric = outcome.BY_KEY[key]
            title = f"{metric.label} against KL"
            bars = ", 95 % intervals" if any(point.error for point in points) else ""
            stages = dict.fromkeys(outcome.stage(p) for p in found if outcome.by_step(p, found))
            unit = f"{prompts} mean{bars}" + "".join(f"; labels: {stage} step" for stage in stages)
            about = "; ".join(f"{p.label}: KL {p.x:.1f}, {metric.label.lower()} {p.y:.2f}" for p in points)
            drawing = _frontier(points, start["name"], THEME[key])
            x_label = f"KL from {outcome.title(start)} (nats an answer)"
            panels.append(Panel(title, unit, x_label, about, *drawing))
    return panels


class _Point(NamedTuple):
    name: str
    label: str
    step: float
    run: str
    x: float
    y: float
    error: float  # half of the 95 % interval, 0 where it is not known

    @classmethod
    def of(cls, policy: outcome.Policy, key: str, by_step: bool) -> _Point | None:
        """by_step: whether its step says which it is (outcome.by_step)."""
        x, y = (outcome.finite(policy["metrics"], name) for name in ("kl", key))
        if x is None or y is None:
            return None
        step = outcome.finite(policy, "step") or 0
        return cls(
            policy["name"],
            f"{step:g}" if by_step else outcome.title(policy),
            step,
            outcome.run_of(policy),
            x,
            y,
            1.96 * (outcome.finite(policy["metrics"], f"{key}_se") or 0),
        )


def _frontier(
    points: list[_Point], start: str, colour: str
) -> tuple[Callable[[Axes], None], Callable[[Axes], None]]:
    """The two steps of drawing: points with their bars and the line in order of training; then the labels."""
    runs = dict.fromkeys(p.run for p in points if p.step) or {"": None}
    paths = [sorted((p for p in points if _on(p, run, start)), key=lambda p: p.step) for run in runs]
    lines = [[(p.x, p.y) for p in path] for path in paths if path]
    places, errors = [(p.x, p.y) for p in points], [p.error for p in points]

    def draw(axes: Axes) -> None:
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=colour, lw=1.4, alpha=0.55, zorder=2)
        xs, ys = zip(*places, strict=True)
        if any(errors):
            axes.errorbar(xs, ys, errors, fmt="none", ecolor=colour, elinewidth=1.1, alpha=0.4, zorder=2)
        faces = [colour if p.step else THEME["paper"] for p in points]
        axes.scatter(xs, ys, s=34, c=faces, edgecolors=colour, linewidths=1.6, zorder=3)
        axes.margins(x=0.09, y=0.14)
        widest = max(xs)
        if min(xs) >= 0:
            axes.set_xlim(-0.07 * (widest or 1), 1.09 * (widest or 1))

    def label(axes: Axes) -> None:
        place(
            axes,
            places,
            errors,
            [p.label for p in points],
            [corner for line in lines for corner in line],
            THEME["ink"],
        )

    return draw, label


def _on(point: _Point, run: str, start: str) -> bool:
    """Whether a point is on the line of a run, which begins at the policy called `start`."""
    return point.name == start or (point.step > 0 and point.run == run)


def _curve_panel(curve: Curve, steps: np.ndarray, values: np.ndarray) -> Panel:
    about = f"from {values[0]:.3g} at step {steps[0]:g} to {values[-1]:.3g} at step {steps[-1]:g}"

    def draw(axes: Axes) -> None:
        colour = THEME[curve.colour]
        smooth = moving_average(values) if len(values) >= SMOOTH_FROM else None
        if curve.target is not None:
            axes.axhline(curve.target, color=THEME["muted"], lw=0.9, ls=(0, (3, 3)), zorder=1)
        lines = {"color": colour, "solid_capstyle": "round", "solid_joinstyle": "round", "zorder": 2}
        axes.plot(steps, values, lw=1.8 if smooth is None else 1, alpha=1 if smooth is None else 0.4, **lines)
        if smooth is not None:
            axes.plot(steps, smooth, lw=2, **lines)
        end = values[-1] if smooth is None else smooth[-1]
        axes.scatter(steps[-1:], [end], s=18, color=colour, zorder=3, clip_on=False)
        axes.annotate(
            format(end, curve.spec) if abs(end) < 1000 else f"{end:,.0f}",
            (steps[-1], end),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=10.5,
            fontweight="bold",
            annotation_clip=False,
        )
        low, high = values.min(), values.max()
        pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
        bottom = low - pad if curve.floor is None or low < curve.floor else curve.floor
        axes.set_ylim(bottom, high + pad)
        if len(steps) == 1:
            axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
        else:
            axes.set_xlim(steps[0], steps[-1])

    return Panel(curve.title, curve.unit, "PPO step", about, draw)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a sixth of the points (5 at least); at the ends, over what there is."""
    reach = max(2, len(values) // 12)
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])
