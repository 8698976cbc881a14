"""What is made of the post-mortem's runs: the figure, and the part of docs/post-mortem.md between its markers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from mistakes import METRICS_SHOWN, SOUND, VARIANTS, Metric, Trial, answers, band, of, table

from rlhf_exp.evaluation.render import THEME, Panel, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEGIN = "<!-- results: begin; written by benchmarks/post_mortem.py -->"
STOP = "<!-- results: end -->"
SIZE = (3.3, 2.3)  # inches a panel
COLOURS = {"objective/scores": "reward", "objective/gold": "gold"}


def write_figure(path: Path, trials: Sequence[Trial]) -> Path:
    """A row for each mistake, a column for each metric; the sound run is grey in all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_png(path, panels(trials), len(METRICS_SHOWN), SIZE)


def panels(trials: Sequence[Trial]) -> list[Panel]:
    """Row by row. Without any mistake: the sound run alone."""
    wrong = [name for name in VARIANTS if name != SOUND and of(trials, name)]
    found = []
    for name in wrong or [SOUND]:
        for metric in METRICS_SHOWN:
            mine, sound = of(trials, name), of(trials, SOUND) if name != SOUND else []
            if metric.key == "objective/scores" and not VARIANTS[name].same_score:
                sound = []  # another reward model, or squashed: not to be compared
            scale = trials if metric.shared else [*mine, *sound]
            found.append(_panel(name, metric, mine, sound, limits(scale, metric.key)))
    return found


def limits(trials: Sequence[Trial], key: str) -> tuple[float, float]:
    """Lowest and highest of the drawn bands, and some room."""
    bands = [band(of(trials, name), key) for name in VARIANTS if of(trials, name)]
    low, high = min(np.nanmin(b.low) for b in bands), max(np.nanmax(b.high) for b in bands)
    room = 0.06 * (high - low) or 0.5
    return float(low - room), float(high + room)


def _panel(
    name: str, metric: Metric, mine: Sequence[Trial], sound: Sequence[Trial], bounds: tuple[float, float]
) -> Panel:
    ends = [trial.end(metric.key) for trial in mine]
    about = f"{metric.label} of {name}: {statistics.fmean(ends):.3g} at the end"
    title = f"{VARIANTS[name].title}: {metric.label}"
    return Panel(title, metric.unit, "PPO step", about, _drawing(metric, mine, sound, bounds))


def _drawing(
    metric: Metric, mine: Sequence[Trial], sound: Sequence[Trial], bounds: tuple[float, float]
) -> Callable[[Axes], None]:
    fired = [step for trial in mine for guard, step in trial.fired().items() if guard in metric.guards]

    def draw(axes: Axes) -> None:
        for trials, colour in ((sound, "muted"), (mine, COLOURS.get(metric.key, "plain"))):
            if trials:
                found = band(trials, metric.key)
                axes.fill_between(found.steps, found.low, found.high, color=THEME[colour], alpha=0.16, lw=0)
                axes.plot(found.steps, found.mean, color=THEME[colour], lw=1.8)
        axes.set_ylim(*bounds)
        if fired:
            height = [bounds[0] + 0.04 * (bounds[1] - bounds[0])] * len(fired)
            axes.scatter(fired, height, marker="^", s=34, color=THEME["ink"], zorder=4, clip_on=False)
        steps = max(len(trial.rows) for trial in mine)
        axes.set_xlim(1, max(2, steps))

    return draw


def block(trials: Sequence[Trial], command: str, figure: str) -> str:
    """What stands between the markers: figure, table, answers, and how it was made. figure: its path as a link."""
    seconds = statistics.median(trial.seconds for trial in trials)
    runs = f"{len(trials)} runs of {max(len(trial.rows) for trial in trials)} iterations"
    parts = [
        f"`{command}`: {runs}, {seconds:.0f} s of PPO each (median, with whatever else the machine did).",
        f"![A row for each mistake: length, KL, proxy and gold against the PPO step]({figure})",
        "Grey is the sound run. Lines are means of the seeds, each smoothed over five iterations; the band is from "
        "the lowest to the highest seed. A triangle is the first iteration in which a guard of that metric fired. "
        "Length and gold have one scale in all rows.",
        "\n".join(table(trials)),
        "Mean over the last six iterations and the seeds, in brackets the lowest and the highest seed. KL is to the "
        "reference that the run has, and as it estimates it: *Wrong reference* and *Sampler not replayed* measure "
        "something else than the rest. Proxies of *No EOS in reward data* and *Sigmoid* are on scales of their own.",
        "\n".join(answers(trials)),
    ]
    return "\n\n".join(part for part in parts if part)


def put(text: str, found: str) -> str:
    """The page with `found` between its markers. SystemExit if it has none."""
    if text.count(BEGIN) != 1 or text.count(STOP) != 1 or text.index(BEGIN) > text.index(STOP):
        raise SystemExit(f"the page has no pair of lines {BEGIN} and {STOP}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{found}\n\n{STOP}{rest.split(STOP)[1]}"
