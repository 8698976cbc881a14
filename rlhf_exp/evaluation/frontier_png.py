"""The pictures of a frontier report as PNG, for documents: one file a source, a panel an objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.evaluation.comparison import evaluated_on
from rlhf_exp.evaluation.frontier import Fit
from rlhf_exp.evaluation.frontier_lines import SOURCES, Line, Picture
from rlhf_exp.evaluation.frontier_plot import RINGS, STEPS, reach, root, scales
from rlhf_exp.evaluation.render import THEME, WIDE, Panel, write_png
from rlhf_exp.evaluation.trials import HELDOUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# those of frontier.css on white
COLOURS = ("#0072b2", "#c75000", "#007a5a", "#b0468a", "#7d6a00", "#2c8fc9", "#8a4fc4", "#4d5965")
MARKERS = ("o", "s", "^", "P")
NAMES = 12  # lines that a legend names


def write(folder: Path, pictures: Sequence[Picture]) -> list[Path]:
    """frontier_heldout.png and frontier_training.png, as far as there is something to show."""
    written = []
    for source in SOURCES:
        found = [picture for picture in pictures if picture.source == source]
        if found:
            panels = [_panel(picture, legend=i == 0) for i, picture in enumerate(found)]
            written.append(write_png(folder / f"frontier_{source}.png", panels, len(panels), WIDE))
    return written


def _panel(picture: Picture, legend: bool) -> Panel:
    def draw(axes: Axes) -> None:
        x, y = scales(picture)
        for line in picture.lines:
            _line(axes, line)
            _law(axes, line, x.most)
        points = [spot.point for spot in picture.pareto]
        if points and len(points) <= RINGS:
            rings = {
                "s": 80,
                "facecolors": "none",
                "edgecolors": THEME["ink"],
                "linewidths": 1.1,
                "zorder": 4,
            }
            axes.scatter([root(p.kl) for p in points], [p.score for p in points], **rings)
        if legend and len(picture.lines) <= NAMES:
            axes.legend(fontsize=8, frameon=False)
        axes.set_xlim(x.low, x.high)
        axes.set_ylim(y.low, y.high)  # a law may go where no point is
        ticks = x.ticks(12)
        axes.set_xticks([root(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])

    title = f"{picture.label} against KL"
    trials = [trial for line in picture.lines for trial in line.group.trials]
    where = evaluated_on(trials) if picture.source == HELDOUT else "training curves"
    unit = f"{where}; rings: Pareto set"
    return Panel(title, unit, "KL from the start (nats an answer), spaced by its root", title, draw)


def _line(axes: Axes, line: Line) -> None:
    colour, marker = COLOURS[line.index % len(COLOURS)], MARKERS[line.index // len(COLOURS) % len(MARKERS)]
    if line.bands:
        low, high = [b.low for b in line.bands], [b.high for b in line.bands]
        axes.fill_between([root(b.kl) for b in line.bands], low, high, color=colour, alpha=0.16, lw=0)
    style = "dotted" if line.unfinished else "solid"
    for path in line.paths:
        axes.plot(
            [root(p.kl) for p in path], [p.score for p in path], color=colour, lw=1.4, alpha=0.7, ls=style
        )
    spots = [spot.point for spot in line.spots]
    label = line.group.label.replace("$", r"\$")  # no formula
    label = f" {label}" if label.startswith("_") else label  # which would hide it
    fills = [THEME["paper"] if p.bound else colour for p in spots]  # hollow: the KL is a bound
    dots = {"s": 22, "c": fills, "edgecolors": colour, "marker": marker, "label": label, "zorder": 3}
    axes.scatter([root(p.kl) for p in spots], [p.score for p in spots], **dots)


def _law(axes: Axes, line: Line, most: float) -> None:
    if not isinstance(line.fit, Fit):
        return
    colour, end = COLOURS[line.index % len(COLOURS)], reach(line, most)
    d = [math.sqrt(end) * i / STEPS for i in range(STEPS + 1)]
    axes.plot(d, [line.fit.at(x * x) for x in d], color=colour, lw=1.2, ls=(0, (5, 3)), zorder=2)
    kl, score = line.fit.peak
    if kl <= end:
        diamond = {"s": 44, "marker": "D", "facecolors": THEME["paper"], "edgecolors": colour, "zorder": 5}
        axes.scatter([root(kl)], [score], **diamond)
