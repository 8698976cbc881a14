"""report.html of stage=report: plots that can be hovered, tables, samples that can be paged through, in one file.

The page loads nothing and runs one script, its own (frontier.js), which its content security policy names by hash: no
other script runs, whatever a prompt or an answer holds. All text is escaped (markup.py) or goes in as text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from rlhf_exp.evaluation import frontier_plot, frontier_sections, outcome
from rlhf_exp.evaluation.comparison import Group
from rlhf_exp.evaluation.frontier_lines import Picture, Spot
from rlhf_exp.evaluation.frontier_samples import section as samples_section
from rlhf_exp.evaluation.frontier_sections import LAWS, NOTES, Report
from rlhf_exp.evaluation.markup import Content, Html, tag
from rlhf_exp.evaluation.trials import HELDOUT, TRAINING


def page(report: Report) -> str:
    """The HTML text."""
    body = [
        _header(report),
        _plots(report),
        frontier_sections.best(report),
        frontier_sections.pareto(report),
        frontier_sections.fits(report),
        frontier_sections.trials(report),
        frontier_sections.config(report),
        samples_section(report.groups),
        _facts(report),
        tag("div", id="tip", hidden=True, role="status"),
    ]
    script = _file("frontier.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("title", report.title),
        tag("style", Html(_file("report.css") + _file("frontier.css"))),
    )
    parts = tag("body", tag("main", body), tag("script", Html(script)))
    return "<!doctype html>\n" + tag("html", head, parts, lang="en") + "\n"


def _file(name: str) -> str:
    return (files("rlhf_exp.evaluation") / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- words


def _header(report: Report) -> Content:
    runs = sum(len(group.trials) for group in report.groups)
    states: dict[str, int] = {}
    for group in report.groups:
        for trial in group.trials:
            states[trial.state.lower()] = states.get(trial.state.lower(), 0) + 1
    yield tag("h1", report.title)
    counts = [f"{runs} run{'s' * (runs != 1)}", f"{len(report.groups)} settings"]
    counts += [f"{count} {state}" for state, count in sorted(states.items())]
    yield tag("p", [tag("span", entry) for entry in counts], cls="meta")
    if said := lead(report):
        yield tag("p", outcome.signed(said), cls="lead")
    if report.warnings:
        yield tag("ul", [tag("li", line) for line in report.warnings], cls="warnings")


def lead(report: Report) -> str:
    """The first picture in a sentence: the best score, and the best under the largest limit that says something."""
    if not report.pictures:
        return "No run has both a score and a KL, so there is no frontier to draw."
    picture = report.pictures[0]
    if not picture.pareto:
        return ""
    top = picture.pareto[-1]
    where = report.evaluated_on if picture.source == HELDOUT else "training prompts"
    name, score = picture.label.lower(), f"{top.point.score:.3g}"
    sentence = f"On {where} the highest {name} is {score}, of {who(picture, top)} at a KL of {_kl(top)}."
    under = [(limit, spot) for limit, spot in picture.best if spot is not None and spot.point != top.point]
    if under:
        limit, spot = under[-1]
        sentence += (
            f" With a KL of at most {limit:g} it is {spot.point.score:.3g}, of {who(picture, spot)} at a KL of "
            f"{_kl(spot)}."
        )
    return sentence


def _kl(spot: Spot) -> str:
    """A KL within a sentence; of best-of-n it is known as a bound only."""
    return f"{'at most ' if spot.point.bound else ''}{spot.point.kl:.3g}"


def who(picture: Picture, spot: Spot) -> str:
    """A policy within a sentence."""
    point = spot.point
    if point.step == 0 and point.kl == 0:
        return "the start"
    label = next(line.group.label for line in picture.lines if line.index == spot.line)
    mean = f", mean of {spot.seeds} seeds" if spot.seeds > 1 else ""
    return f"{label} ({point.name}{mean})"


# ---------------------------------------------------------------- plots


def _plots(report: Report) -> Content:
    for source in (HELDOUT, TRAINING):
        found = [picture for picture in report.pictures if picture.source == source]
        if not found:
            continue
        yield tag("h2", report.said(source))
        yield tag("p", NOTES[source], cls="note")
        yield tag("div", _key(found), cls="key")
        yield _legend(report.groups, {line.index for picture in found for line in picture.lines})
        drawn = [
            tag(
                "figure",
                tag("h3", f"{picture.label} against KL"),
                frontier_plot.svg(picture, f"{source}{i}"),
                cls="plot",
            )
            for i, picture in enumerate(found)
        ]
        yield tag("div", drawn, cls="panels wide")


def _key(found: Sequence[Picture]) -> Content:
    """What the marks mean, those that are there."""
    lines = [line for picture in found for line in picture.lines]
    yield tag("span", "○ and the thin steps: the Pareto set")
    if any(line.bands for line in lines):
        yield tag("span", "shaded: from seed to seed, the line is their mean")
    if any(line.unfinished for line in lines):
        yield tag("span", "dotted: not finished")
    if any(point.bound for line in lines for _, points in line.members for point in points):
        yield tag(
            "span", "hollow: best of n, whose KL is at most this, log n − (n − 1)/n beyond its policy's"
        )
    forms = dict.fromkeys(line.fit.form for line in lines if not isinstance(line.fit, str))
    if forms:
        yield tag("span", f"dashed: {' or '.join(LAWS[form] for form in forms)}, ◇ its peak")
    yield tag("span", "hover for figures; click a name to hide its line")


def _legend(groups: Sequence[Group], shown: set[int]) -> Html:
    entries = []
    for i, group in enumerate(groups):
        if i not in shown:
            continue
        shape = i // frontier_plot.COLOURS % frontier_plot.SHAPES
        swatch = tag(
            "svg", frontier_plot.mark(8, 8, 5, shape, cls="dot"), viewBox="0 0 16 16", aria_hidden="true"
        )
        more = f"{len(group.trials)} seeds" if len(group.trials) > 1 else ""
        states = sorted({trial.state.lower() for trial in group.trials} - {"finished"})
        told = ", ".join(filter(None, [more, *states]))
        note = tag("small", told, title=f"seeds {', '.join(group.seeds)}") if told else None
        button = tag(
            "button",
            swatch,
            tag("span", group.label),
            note,
            type="button",
            aria_pressed="true",
            data_of=str(i),
            cls=f"c{i % frontier_plot.COLOURS}",
        )
        entries.append(tag("li", button))
    return tag("ul", entries, cls="legend")


def _facts(report: Report) -> Content:
    yield tag("h2", "This report")
    entries = []
    for name, value in report.facts.items():
        entries.append([tag("dt", name), tag("dd", tag("code", value) if name == "command" else value)])
    yield tag("dl", entries, cls="facts")
