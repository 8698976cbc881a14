"""The tables of a frontier report's page: best under a limit, Pareto set, laws, trials, configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_exp.evaluation import comparison, frontier_plot, outcome
from rlhf_exp.evaluation.comparison import Group
from rlhf_exp.evaluation.frontier_lines import Picture, Spot
from rlhf_exp.evaluation.frontier_tables import Table
from rlhf_exp.evaluation.markup import Content, Html, tag
from rlhf_exp.evaluation.trials import HELDOUT, TRAINING

NOTES = {
    HELDOUT: (
        "Each dot is a policy that an evaluation looked at: SFT, kept checkpoints, results of other algorithms.",
    ),
    TRAINING: (
        "From each run's own log, on the prompts that it trained on, KL as estimated from its samples; a dot is one "
        "step, or the mean of several that follow one another.",
    ),
}
MUCH = 1e6
LAWS = {
    "rl": "R = start + d (α − β log d)",
    "bon": "R = start + d (α − β d)",
}


class Report(NamedTuple):
    """All that a page shows."""

    title: str
    groups: Sequence[Group]
    pictures: Sequence[Picture]
    tables: Mapping[str, Table]
    warnings: Sequence[str]
    facts: Mapping[str, str]
    fit: str

    @property
    def evaluated_on(self) -> str:
        """On what prompts evaluations were made."""
        return comparison.evaluated_on([trial for group in self.groups for trial in group.trials])

    def said(self, source: str) -> str:
        """What a source is called."""
        return self.evaluated_on.capitalize() if source == HELDOUT else "Training curves"


def figure(value: Any) -> str:
    """A number of a table: four figures; nothing as a dash."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return outcome.MISSING if value is None or value == "" else str(value)
    return outcome.signed(outcome.write(value, ".4g"))


def kl_of(value: float, bound: bool) -> str:
    """A KL, which of best-of-n is known to be no more than this."""
    return f"≤ {figure(value)}" if bound else figure(value)


def table(
    rows: Sequence[Mapping[str, Content]], label: str, text: Sequence[str] = (), wrap: Sequence[str] = ()
) -> Html:
    """Rows of {heading: content}; the first column heads its row, those of `text` and `wrap` are words."""
    kind = {name: "words" for name in text} | {name: "words wrap" for name in wrap}
    head = [tag("th", name, scope="col", cls=kind.get(name)) for name in rows[0]]
    body = []
    for row in rows:
        first, *rest = row.items()
        cells = [tag("td", value, cls=kind.get(name)) for name, value in rest]
        body.append(tag("tr", tag("th", first[1], scope="row"), cells))
    whole = tag("table", tag("thead", tag("tr", head)), tag("tbody", body))
    return tag("div", whole, cls="scroll", tabindex="0", role="region", aria_label=label)


def _swatched(report: Report, label: str) -> Content:
    """A group's name with its colour."""
    index = next((i for i, group in enumerate(report.groups) if group.label == label), None)
    if index is None:
        return label or "start (SFT)"
    return [tag("span", cls=f"swatch c{index % frontier_plot.COLOURS}"), label]


def best(report: Report) -> Content:
    """A table for each source: limits by objectives."""
    if not report.pictures:
        return
    yield tag("h2", "Best under a KL limit")
    note = "The highest score among the dots above (seeds averaged); ± is one standard error over prompts."
    yield tag("p", note, cls="note")
    for source in (HELDOUT, TRAINING):
        found = [picture for picture in report.pictures if picture.source == source]
        if not found or not found[0].best:
            continue
        rows: list[dict[str, Content]] = []
        for i, (limit, _) in enumerate(found[0].best):
            cells = {picture.label: _chosen(report, picture, picture.best[i][1]) for picture in found}
            rows.append({"KL at most": f"{limit:g}", **cells})
        yield tag("h3", report.said(source))
        yield table(
            rows, f"Best under a KL limit, {report.said(source)}", [picture.label for picture in found]
        )


def _chosen(report: Report, picture: Picture, spot: Spot | None) -> Content:
    """A score, and below it whose."""
    if spot is None:
        return tag("span", "no policy", cls="quiet")
    point = spot.point
    error = tag("small", f" ± {point.se:.2g}") if point.se else None
    whose: Content = "start (SFT)"
    if point.step != 0 or point.kl != 0:
        label = next(line.group.label for line in picture.lines if line.index == spot.line)
        whose = [_swatched(report, label), f", {point.name}, KL {kl_of(point.kl, point.bound)}"]
    return [tag("b", figure(point.score)), error, tag("div", whose, cls="whose")]


def pareto(report: Report) -> Content:
    rows = report.tables.get("pareto", [])
    if not rows:
        return
    yield tag("h2", "Pareto set")
    yield tag("p", "Policies that no other beats: none has both a lower KL and a higher score.", cls="note")
    labels = {(p.source, p.objective): p.label for p in report.pictures}
    for number, ((source, objective), label) in enumerate(labels.items()):
        shown = [
            {
                "Trial": _swatched(report, row["group"]),
                "Policy": row["policy"],
                "KL": kl_of(row["kl"], row["kl_is"] == "bound"),
                label: [figure(row["score"]), tag("small", f" ± {row['se']:.2g}") if row["se"] else None],
                "Seeds": figure(row["seeds"]),
            }
            for row in rows
            if (row["source"], row["objective"]) == (source, objective)
        ]
        if shown:
            title = f"{label}, {report.said(source).lower()}: {len(shown)} policies"
            yield tag("details", tag("summary", title), table(shown, title, ["Policy"]), open=number == 0)


def fits(report: Report) -> Content:
    rows = report.tables.get("fits", [])
    if not rows or report.fit == "none":
        return
    yield tag("h2", "Over-optimisation")
    forms = dict.fromkeys([report.fit, *(row["form"] for row in rows if row["form"])])
    yield tag(
        "p",
        f"{' or, of best-of-n, '.join(LAWS[form] for form in forms)} with d = √KL (Gao et al. 2022, "
        "arXiv:2210.10760), by least squares over the policies of a line, seeds "
        "together. Where β > 0 the score turns: beyond its peak, further from the start is worse.",
        cls="note",
    )
    for number, picture in enumerate(report.pictures):
        shown = [
            {
                "Trial": _swatched(report, row["group"]),
                "α": figure(row["alpha"]),
                "β": figure(row["beta"]),
                "R²": outcome.signed(outcome.write(row["r2"], ".2f")),
                "Points": figure(row["points"]),
                "Peak d": _peak(row["peak_d"]),
                "Peak KL": _peak(row["peak_kl"]),
                "Peak score": _peak(row["peak_score"]),
                "Note": row["note"],
            }
            for row in rows
            if (row["source"], row["objective"]) == (picture.source, picture.objective)
        ]
        title = f"{picture.label}, {report.said(picture.source).lower()}"
        whole = table(shown, f"Over-optimisation, {title}", wrap=["Note"])
        yield tag("details", tag("summary", title), whole, open=number == 0)


def _peak(value: float | None) -> str:
    """A law that hardly turns has its peak anywhere: beyond a million the figure says no more."""
    return f"> {MUCH:g}" if value is not None and value > MUCH else figure(value)


def trials(report: Report) -> Content:
    yield tag("h2", "Trials")
    shown = []
    every = [trial for group in report.groups for trial in group.trials]
    for group, trial in [(g, t) for g in report.groups for t in g.trials]:
        row: dict[str, Content] = {
            "Trial": _swatched(report, group.label),
            "Run": tag("span", trial.name, title=trial.path),
            "State": trial.state.lower(),
        }
        if any(each.reason for each in every):
            row["What happened"] = trial.reason
        row |= {
            "Seed": figure(trial.config.get("seed")),
        }
        for source, word in ((TRAINING, "train"), (HELDOUT, report.evaluated_on.split()[0])):
            last = trial.last(source)
            if source == TRAINING:
                row["Steps"] = figure(last.step if last else None)
            kl = last.metrics.get("kl") if last else None
            row[f"KL ({word})"] = figure(kl) if kl is None else kl_of(kl, last.bound)
            for name in dict.fromkeys(p.objective for p in report.pictures if p.source == source):
                label = next(p.label for p in report.pictures if p.objective == name)
                row[f"{label} ({word})"] = figure(last.metrics.get(name) if last else None)
        shown.append(row)
    yield table(shown, "Trials", ["Run", "State"], ["What happened"])
    yield tag("p", "Figures of the last step or checkpoint.", cls="note")


def config(report: Report) -> Content:
    rows = report.tables.get("config", [])
    yield tag("h2", "How the configs differ")
    if not rows:
        yield tag("p", "They do not, but for the seed.", cls="note")
        return
    keys = [key for key in rows[0] if key not in ("group", "run")]
    shown = [
        {"Trial": _swatched(report, row["group"])} | {key: row[key] or outcome.MISSING for key in keys}
        for row in {row["group"]: row for row in rows}.values()  # those of a group are alike
    ]
    yield tag("p", f"{len(keys)} settings differ; – is of a stage that has no such setting.", cls="note")
    yield table(shown, "How the configs differ", keys)
