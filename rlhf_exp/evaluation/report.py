"""The report of an experiment: one HTML file that needs nothing else, and its figures as PNG.

The page has no scripts and loads nothing; all text that comes from a model or a data set is escaped
(markup.py), and a content security policy forbids what might slip through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlhf_exp.evaluation import figures, findings, outcome, render, reward_section, samples, win_figures
from rlhf_exp.evaluation.interval import LEAST
from rlhf_exp.evaluation.markup import Content, Html, tag

# dataset.evaluate_on -> the fact that says how many were answered
PROMPTS = {"heldout": "held-out prompts", "validation": "validation prompts", "train": "training prompts"}
HEADER = ("model", "dataset", *PROMPTS.values(), "duration")  # facts that stand under the title too
_CSP = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    folder: Path,
    title: str,
    evaluation: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    rewards: Sequence[reward_section.RewardModel] = (),
) -> list[Path]:
    """Write report.html, frontier.png, training.png, optimiser.png, wins.png to `folder`; returns what was written.

    evaluation: the content of eval.json (its form: outcome.py). curves: the rows of the PPO run's
    metrics.jsonl, possibly none. facts: shown in their order, `model`, `dataset`, `held-out prompts` and
    `duration` under the title too; those whose name has the word `command` are set as code; `mlflow` is the
    command or address that shows the runs. rewards: the models whose scores are the reward. A figure without any
    data is not written.
    Raises ValueError for an evaluation without policies.
    """
    found = outcome.policies(evaluation)
    frontier = figures.frontier_panels(found, outcome.prompts(evaluation))
    training = figures.curve_panels(curves, figures.TRAINING)
    optimiser = figures.curve_panels(curves, figures.OPTIMISER)

    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    body = [
        _header(title, evaluation, curves, facts),
        _frontier(frontier, found),
        win_figures.section(evaluation),
        _curves(training, optimiser, curves),
        _table(evaluation),
        reward_section.section(rewards),
        samples.section(evaluation),
        _facts(facts),
    ]
    page.write_text(_page(title, body), encoding="utf-8")
    written = [page]
    for name, panels, columns, size in (
        ("frontier", frontier, 2, render.WIDE),
        ("training", training, 3, render.PANEL),
        ("optimiser", optimiser, 3, render.PANEL),
    ):
        if panels:
            written.append(render.write_png(folder / f"{name}.png", panels, columns, size))
    if wins := win_figures.panel(evaluation):
        written.append(render.write_png(folder / "wins.png", [wins], 1, win_figures.size(evaluation)))
    return written


def _page(title: str, body: Content) -> str:
    style = Html((files("rlhf_exp.evaluation") / "report.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_CSP),
        tag("title", title),
        tag("style", style),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", body)), lang="en") + "\n"


def _header(
    title: str, evaluation: Mapping[str, Any], curves: Sequence[Mapping[str, Any]], facts: Mapping[str, str]
) -> Content:
    found = outcome.policies(evaluation)
    meta = [f"{facts[key]} {key}" if "prompts" in key else facts[key] for key in HEADER if key in facts]
    yield tag("h1", title)
    yield tag("p", [tag("span", entry) for entry in meta], cls="meta") if meta else None
    yield tag("p", outcome.signed(findings.verdict(found, outcome.how_many(evaluation))), cls="lead")
    if lines := findings.warnings(found, curves):
        yield tag("ul", [tag("li", line) for line in lines], cls="warnings")
    before, after = outcome.baseline(found), outcome.last(found)
    shown = [metric for metric in outcome.measured(found) if metric.key != "eos_rate"]
    yield tag("div", [_tile(metric, before, after) for metric in shown], cls="tiles")
    if before is not after:
        last = ", the last checkpoint" if outcome.by_step(after, found) else ""
        yield tag(
            "p",
            f"{after['name']}{last}, against {before['name']}. {_how_sure(after, outcome.how_many(evaluation))}",
            cls="note",
        )


def _how_sure(after: outcome.Policy, prompts: int | None) -> str:
    if after.get("gain"):
        if prompts is not None and prompts < LEAST:
            return f"{findings.too_few(prompts)}."
        count = f"{prompts} " if prompts else ""
        return f"Ranges are 95 % intervals of the change, by a bootstrap over the {count}prompts."
    if any(key.endswith("_se") for key in after["metrics"]):
        return "Ranges are 95 % intervals of the change, from the two standard errors as if independent."
    return ""


def _tile(metric: outcome.Metric, before: outcome.Policy, after: outcome.Policy) -> Html:
    value = outcome.signed(outcome.shown(after, metric))
    lines: list[Content] = [
        tag("div", metric.label, cls="name"),
        tag("div", value, tag("small", f" {metric.unit}") if metric.unit else None, cls="value"),
    ]
    if metric.key == "win_rate":
        ends = [outcome.finite(after["metrics"], f"win_rate_{end}") for end in ("low", "high")]
        lines.append(tag("div", "50% is no difference", cls="from"))
        if None not in ends:
            lines.append(tag("div", tag("span", "{:.0%} to {:.0%}".format(*ends), cls="range"), cls="from"))
    elif before is not after:
        start = outcome.signed(outcome.write(outcome.number(before["metrics"], metric.key), metric.spec))
        lines.append(tag("div", f"{before['name']} {start}", cls="from"))
        lines.append(tag("div", _change(metric, before, after), cls="from"))
    return tag("div", lines, cls=f"tile {metric.key}", title=metric.note)


def _change(metric: outcome.Metric, before: outcome.Policy, after: outcome.Policy) -> Content:
    difference = outcome.change(before, after, metric.key)
    if difference is None or metric.key == "kl":  # its change is the figure itself
        return None
    if outcome.write(difference[0], metric.spec) == outcome.write(0.0, metric.spec) and None in difference:
        return "unchanged"
    mean, low, high = (_difference(part, metric) for part in difference)
    return [tag("b", mean), tag("span", f" {low} to {high}", cls="range") if None not in difference else None]


def _frontier(panels: Sequence[render.Panel], found: Sequence[outcome.Policy]) -> Content:
    yield tag("h2", "What the reward costs")
    if not panels:
        yield tag("p", "No policy has both a score and a KL, so there is no frontier to draw.", cls="note")
        return
    two, start = len(panels) == 2, outcome.title(outcome.baseline(found))
    yield tag(
        "p",
        f"Each point is a policy: how far it went from {start} (KL), and what that bought. ",
        "Where the reward still rises and the gold score falls, the reward is being exploited."
        if two
        else None,
        cls="note",
    )
    yield tag("div", _drawn(panels, render.PAGE_WIDE, "frontier"), cls="panels wide")


def _curves(
    training: Sequence[render.Panel], optimiser: Sequence[render.Panel], curves: Sequence[Mapping[str, Any]]
) -> Content:
    yield tag("h2", "Training")
    if not training and not optimiser:
        yield tag("p", "No training curves: the PPO run's metrics were not given.", cls="note")
        return
    smooth = (
        "The bold line is a moving average, the number its end. "
        if len(curves) >= figures.SMOOTH_FROM
        else ""
    )
    yield tag("p", f"On training prompts, while sampling. {smooth}{_pace(curves)}", cls="note")
    yield tag("div", _drawn(training, render.PAGE_PANEL, "training"), cls="panels")
    if optimiser:
        yield tag(
            "details",
            tag("summary", "The optimiser: step size, clipping, gradients, critic"),
            tag("div", _drawn(optimiser, render.PAGE_PANEL, "optimiser"), cls="panels"),
        )


def _drawn(panels: Sequence[render.Panel], size: tuple[float, float], name: str) -> list[Html]:
    return [
        tag(
            "figure",
            Html(render.svg(panel, size, f"{name}{i}")),
            role="img",
            aria_label=f"{panel.title}, {panel.unit}: {panel.about}",
        )
        for i, panel in enumerate(panels)
    ]


def _pace(curves: Sequence[Mapping[str, Any]]) -> str:
    """Mean seconds of a step by its parts."""
    parts = {}
    for name in ("rollout", "score", "update"):
        seconds = [value for row in curves if (value := outcome.finite(row, f"time/{name}")) is not None]
        if seconds:
            parts[name] = sum(seconds) / len(seconds)
    if not parts:
        return ""
    listed = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in parts.items())
    return f"A step took {sum(parts.values()):.2g} s on average: {listed}."


def _table(evaluation: Mapping[str, Any]) -> Content:
    found = outcome.policies(evaluation)
    metrics = outcome.measured(found)
    winners = {metric.key: outcome.best(found, metric) for metric in metrics}
    head = [
        tag("th", m.label, tag("small", m.unit) if m.unit else None, scope="col", title=m.note)
        for m in metrics
    ]
    rows = []
    for policy in outcome.rows(evaluation):
        cells = []
        for metric in metrics:
            error = outcome.finite(policy["metrics"], f"{metric.key}_se")
            figure = outcome.signed(outcome.shown(policy, metric))
            width = tag("small", f" ± {outcome.write(error, metric.spec)}") if error else None
            cells.append(tag("td", figure, width, cls="best" if winners[metric.key] is policy else None))
        rows.append(tag("tr", tag("th", policy["name"], scope="row"), cells))
    yield tag("h2", "All policies")
    table = tag("table", tag("thead", tag("tr", tag("th", "Policy", scope="col"), head)), tag("tbody", rows))
    yield tag("div", table, cls="scroll", tabindex="0", role="region", aria_label="All policies")
    star = "★ is the best of its column; " if any(winners.values()) else ""
    yield tag("p", f"{star}± is one standard error. {outcome.about_data(evaluation)}".strip(), cls="note")
    meanings = [[tag("dt", metric.label), tag("dd", metric.note)] for metric in metrics]
    yield tag("details", tag("summary", "What the columns mean"), tag("dl", meanings, cls="facts"))


def _facts(facts: Mapping[str, str]) -> Content:
    rest = {name: value for name, value in facts.items() if name != "mlflow"}
    if rest:
        yield tag("h2", "This run")
        entries = []
        for name, value in rest.items():
            shown = tag("code", str(value)) if "command" in name.lower() else str(value)
            entries.append([tag("dt", name), tag("dd", shown)])
        yield tag("dl", entries, cls="facts")
    if where := facts.get("mlflow"):
        yield tag("h2", "Every number: MLflow")
        if where.startswith(("http://", "https://")):
            yield tag("p", "All metrics, parameters, samples and figures of these runs are at")
            yield tag("code", where, cls="command")
        else:
            yield tag(
                "p", "All metrics, parameters, samples and figures of these runs are in MLflow. Start it with"
            )
            yield tag("code", where, cls="command")
            yield tag("p", "and open ", tag("code", "http://127.0.0.1:5000"), " in a browser.")


def _difference(value: float | None, metric: outcome.Metric) -> str:
    """With its sign; of two shares in points, since `+3 %` could be taken for a relative change."""
    if value is not None and metric.spec.endswith("%"):
        return outcome.signed(outcome.write(100 * value, "+.0f") + " points")
    return outcome.signed(outcome.write(value, "+" + metric.spec))
