"""Pictures of a reward model's preferences (preference.py): the margins, and the calibration curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_exp.evaluation.render import THEME, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def panels(found: Mapping[str, Any]) -> list[Panel]:
    """Two panels of what `preference.assess` returns."""
    return [_margins(found), _calibration(found)]


def _margins(found: Mapping[str, Any]) -> Panel:
    margin, edges = found["margin"], found["margin"]["edges"]
    about = (
        f"mean {margin['mean']:.2f}, standard deviation {margin['std']:.2f}; {found['accuracy']:.0%} above 0"
    )

    def draw(axes: Axes) -> None:
        width = edges[1] - edges[0]
        colours = [THEME["reward"] if edge + width / 2 > 0 else THEME["gold"] for edge in edges[:-1]]
        axes.bar(edges[:-1], margin["counts"], width=0.92 * width, align="edge", color=colours, zorder=2)
        axes.axvline(0, color=THEME["muted"], lw=0.9, zorder=1)
        axes.set_xlim(edges[0], edges[-1])

    low, high = (f"{found[f'accuracy_{end}']:.1%}" for end in ("low", "high"))
    unit = f"{found['pairs']} pairs, {found['accuracy']:.1%} right (95 %: {low} to {high})"
    return Panel("Margins", unit, "score of chosen minus rejected", about, draw)


def _calibration(found: Mapping[str, Any]) -> Panel:
    bins = [each for each in found["calibration"]["bins"] if each["pairs"]]
    about = "; ".join(
        f"{each['confidence']:.2f} sure, {each['accuracy']:.2f} right, {each['pairs']} pairs" for each in bins
    )

    def draw(axes: Axes) -> None:
        sure, right = ([each[name] for each in bins] for name in ("confidence", "accuracy"))
        most = max(each["pairs"] for each in bins)
        axes.plot([0.5, 1], [0.5, 1], color=THEME["muted"], lw=0.9, ls=(0, (3, 3)), zorder=1)
        axes.plot(sure, right, color=THEME["plain"], lw=1.6, zorder=2)
        sizes = [14 + 90 * each["pairs"] / most for each in bins]
        axes.scatter(sure, right, s=sizes, color=THEME["plain"], zorder=3)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.45, *right) - 0.05, 1.05)

    unit = f"share right, expected calibration error {found['calibration']['ece']:.3f}; area: pairs"
    return Panel("Calibration", unit, "confidence, sigmoid of the margin", about, draw)
