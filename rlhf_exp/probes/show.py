"""What probes found, for people: a table for the terminal and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.evaluation.render import THEME, Panel, write_png
from rlhf_exp.evaluation.tables import line_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

ABOUT = {
    "empty": "no characters",
    "eos_only": "EOS alone",
    "short": "its first 1-3 words",
    "repeated": "three of its words, repeated",
    "emoji": "a run of emoji",
    "echo": "the prompt",
    "shuffled": "its words in another order",
    "other_answer": "what answers another prompt",
    "other_language": "in another language",
    "refusal": "a refusal",
    "truncated": "cut in mid-sentence",
    "unfinished": "ends in mid-sentence",
    "long": "it, then other answers",
    "thanks": "it, then thanks or praise",
}
SAME = {
    "whitespace": "other spaces and breaks",
    "padding": "PAD behind it",
    "neighbours": "in a batch with others",
}
EXAMPLE = 160  # characters of an example
SIZE = (6.2, 4.6)  # inches of a panel

Report = Mapping[str, Any]


def table(report: Report, limits: Mapping[str, float] | None = None, before: Report | None = None) -> Table:
    """Kinds by what they score beside the real answer; with `before`, a column of the same probes then. 80 columns.

    limits: kind -> share; a share above it is red.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    found = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", caption_style="dim")
    found.caption_justify = "left"
    found.caption = "\n".join(captions(report))
    found.add_column("instead of the real answer", no_wrap=True)
    if before is not None:
        found.add_column("before", justify="right", no_wrap=True)
    found.add_column("above" if before is None else "after", justify="right", no_wrap=True)
    found.add_column("95 %", justify="right", no_wrap=True)
    found.add_column("shift", justify="right", no_wrap=True)
    found.add_column("n", justify="right", no_wrap=True)
    for name, part in [*report["kinds"].items(), *report["invariances"].items()]:
        same = name in report["invariances"]
        limit = (limits or {}).get(name)
        bad = limit is not None and part["share"] is not None and part["share"] > limit
        label = Text(f"{name} ", style="cyan").append((SAME if same else ABOUT)[name], style="dim")
        cells = [label]
        if before is not None:
            then = (before["invariances"] if same else before["kinds"]).get(name)
            cells.append(Text(_percent(then["share"] if then else None)))
        cells.append(Text(_percent(part["share"]), style="bold red" if bad else ""))
        cells.append(Text(f"{_percent(part['low'])}-{_percent(part['high'])}" if part["n"] else ""))
        cells.append(Text(_signed(part["mean" if same else "shift"], same)))
        found.add_row(*cells, Text(str(part["n"])))
    return found


def captions(report: Report) -> Iterator[str]:
    """The lines under the table: what is counted, and what score and length have to do with each other."""
    yield "% of prompts that score above the real answer; mean shift of score"
    right, length = report["accuracy"], report["length"]
    if report["invariances"]:
        yield "last rows: % of pairs ordered the other way; mean change of score"
    if right["share"] is not None:
        low, high = _percent(right["low"]), _percent(right["high"])
        yield f"of {right['n']} real pairs {_percent(right['share'])} % in order ({low}-{high})"
    if report["spread"] == 0:
        yield "all chosen answers have the same score: this model tells none apart"
    said = [
        f"{part['r']:+.2f} {words}"
        for words, part in (("over answers", length["answers"]), ("within pairs", length["pairs"]))
        if part["r"] is not None
    ]
    if said:
        yield f"score and length correlate {', '.join(said)}"


def examples(report: Report, kinds: Sequence[str], most: int = 1) -> Iterator[str]:
    """Lines: the probes that scored highest above the real answer, of the kinds that have one."""
    for kind in kinds:
        for row in report["kinds"][kind]["worst"][:most]:
            if row["score"] > row["chosen_score"]:
                prompt, text, chosen = (line_of(row[name]) for name in ("prompt", "text", "chosen"))
                yield (
                    f"{kind}: {row['score']:+.2f} {_cut(text) or '(nothing)'}   where {row['chosen_score']:+.2f} "
                    f"{_cut(chosen)}   to ...{prompt[-60:]}"
                )


def write_picture(
    path: Path, report: Report, limits: Mapping[str, float], before: Report | None = None
) -> Path:
    """Shares with their intervals and limits, mean shifts, and scores against lengths, side by side."""
    return write_png(path, panels(report, limits, before), 3, SIZE)


def panels(report: Report, limits: Mapping[str, float], before: Report | None = None) -> list[Panel]:
    kinds = [name for name, part in report["kinds"].items() if part["n"]]
    found = []
    if kinds:
        found += [_shares(report, kinds, limits, before), _shifts(report, kinds, before)]
    return [*found, _lengths(report)]


def _shares(report: Report, kinds: list[str], limits: Mapping[str, float], before: Report | None) -> Panel:
    def draw(axes: Axes) -> None:
        for y, kind in enumerate(kinds):
            if (limit := limits.get(kind)) is not None:
                axes.plot([limit] * 2, [y - 0.35, y + 0.35], color=THEME["muted"], lw=1.4, zorder=1)
            if then := _of(before, kind):
                axes.scatter(
                    [then["share"]], [y], s=34, facecolors="none", edgecolors=THEME["gold"], zorder=2
                )
            part = report["kinds"][kind]
            over = limit is not None and part["share"] > limit
            colour = THEME["gold" if over and before is None else "reward"]
            axes.plot([part["low"], part["high"]], [y, y], color=colour, lw=1.6, alpha=0.5, zorder=2)
            axes.scatter([part["share"]], [y], s=34, color=colour, zorder=3)
        _rows(axes, kinds)
        axes.set_xlim(-0.03, 1.03)

    about = "; ".join(f"{kind} {report['kinds'][kind]['share']:.2f}" for kind in kinds)
    ring = "; rings: before" if before else ""
    return Panel("Scored above the real answer", f"bars: limits{ring}", "share of prompts, 95 %", about, draw)


def _shifts(report: Report, kinds: list[str], before: Report | None) -> Panel:
    def draw(axes: Axes) -> None:
        axes.axvline(0, color=THEME["muted"], lw=0.9, zorder=1)
        for y, kind in enumerate(kinds):
            if (then := _of(before, kind)) and before["spread"]:
                axes.scatter(
                    [then["shift"] / before["spread"]],
                    [y],
                    s=34,
                    facecolors="none",
                    edgecolors=THEME["gold"],
                    zorder=2,
                )
            shift = report["kinds"][kind]["shift"] / unit
            axes.plot([0, shift], [y, y], color=THEME["reward"], lw=1.6, alpha=0.5, zorder=2)
            axes.scatter([shift], [y], s=34, color=THEME["reward"], zorder=3)
        _rows(axes, kinds)

    unit = report["spread"] or 1.0
    about = "; ".join(f"{kind} {report['kinds'][kind]['shift'] / unit:+.2f}" for kind in kinds)
    words = "standard deviations of the real answers' scores"
    return Panel("Mean shift of the score", "probe minus real answer", words, about, draw)


def _lengths(report: Report) -> Panel:
    def draw(axes: Axes) -> None:
        for name, colour in (("rejected", "muted"), ("chosen", "plain")):
            x = [row[f"{name}_tokens"] for row in report["real"]]
            y = [row[name] for row in report["real"]]
            axes.scatter(x, y, s=16, color=THEME[colour], alpha=0.7, linewidths=0, label=name, zorder=2)
        axes.legend(frameon=False, fontsize=10, loc="best", labelcolor=THEME["muted"])

    r = report["length"]["answers"]["r"]
    unit = "real answers" + ("" if r is None else f", r = {r:+.2f}")
    return Panel("Score and length", unit, "tokens of the answer", f"{report['pairs']} pairs", draw)


def _rows(axes: Axes, kinds: list[str]) -> None:
    """A row a kind, the first on top, named at the left."""
    from matplotlib.ticker import FixedLocator

    axes.yaxis.set_major_locator(FixedLocator(range(len(kinds))))
    axes.set_yticklabels(kinds)
    axes.set_ylim(len(kinds) - 0.4, -0.6)


def _of(before: Report | None, kind: str) -> Mapping[str, Any] | None:
    part = before["kinds"].get(kind) if before else None
    return part if part and part["n"] else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def _signed(value: float | None, plain: bool) -> str:
    if value is None:
        return "-"
    return f"{value:+.2f}" if not plain else f"{value:.2f}" if value >= 0.01 or not value else f"{value:.0e}"


def _cut(text: str) -> str:
    return text if len(text) <= EXAMPLE else f"{text[:EXAMPLE].rstrip()} …"
