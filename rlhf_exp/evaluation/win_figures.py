"""Win rates in the report: a figure with a row for each policy and its interval, and the figures in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_exp.evaluation import findings, outcome, render
from rlhf_exp.evaluation.interval import LEAST
from rlhf_exp.evaluation.markup import Content, Html, tag
from rlhf_exp.evaluation.render import THEME, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOW, HIGH, TIES, CONSISTENT = "win_rate_low", "win_rate_high", "win_rate_ties", "judge_consistent"
WIDTH, ROW, FRAME = 5.6, 0.34, 1.25  # inches of the figure: wide, high for each policy, high besides


def compared(evaluation: Mapping[str, Any]) -> list[outcome.Policy]:
    """The policies that have a win rate."""
    found = outcome.policies(evaluation)
    return [policy for policy in found if outcome.finite(policy["metrics"], "win_rate") is not None]


def panel(evaluation: Mapping[str, Any]) -> Panel | None:
    """A dot and an interval for each policy, the first on top; None where there is no win rate."""
    found = compared(evaluation)
    if not found:
        return None
    against = outcome.against(evaluation)
    about = "; ".join(f"{policy['name']} {_interval(policy)}" for policy in found)
    title = f"Win rate against {against}"
    return Panel(title, "95 % intervals, ties half", "share of prompts won", about, _draw(found))


def size(evaluation: Mapping[str, Any]) -> tuple[float, float]:
    """Width and height of the figure in inches."""
    return WIDTH, FRAME + ROW * len(compared(evaluation))


def _draw(found: Sequence[outcome.Policy]) -> Callable[[Axes], None]:
    rates = [outcome.finite(policy["metrics"], "win_rate") for policy in found]
    # one prompt has no interval
    lows, highs = (
        [
            rate if (end := outcome.finite(policy["metrics"], key)) is None else end
            for rate, policy in zip(rates, found, strict=True)
        ]
        for key in (LOW, HIGH)
    )

    def draw(axes: Axes) -> None:
        rows = list(range(len(found)))
        axes.axvline(0.5, color=THEME["muted"], lw=0.9, ls=(0, (3, 3)), zorder=1)
        axes.hlines(rows, lows, highs, color=THEME["plain"], lw=2, alpha=0.45, zorder=2)
        axes.scatter(rates, rows, s=34, color=THEME["plain"], zorder=3, clip_on=False)
        axes.set_yticks(rows, [policy["name"] for policy in found], parse_math=False)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=THEME["grid"], lw=0.9)

    return draw


def section(evaluation: Mapping[str, Any]) -> Content:
    """Who judged, the figure and the table; nothing where there is no win rate."""
    drawn = panel(evaluation)
    if drawn is None:
        return
    judge, against = evaluation.get("judge") or {}, outcome.against(evaluation)
    yield tag("h2", "Win rates")
    yield tag(
        "p",
        f"How often a policy's answer is better than that of {against}, to the same prompt with the same noise"
        + (f", by {judge['by']}" if judge.get("by") else "")
        + f". A tie counts half, so that 50% is no difference; {_how_sure(outcome.how_many(evaluation))}.",
        cls="note",
    )
    picture = Html(render.svg(drawn, size(evaluation), "wins"))
    label = f"{drawn.title}: {drawn.about}"
    yield tag("div", tag("figure", picture, role="img", aria_label=label), cls="panels wide")
    yield tag("div", _table(evaluation), cls="scroll", tabindex="0", role="region", aria_label="Win rates")


def _how_sure(prompts: int | None) -> str:
    if prompts is not None and prompts < LEAST:
        return findings.too_few(prompts)
    count = f"{prompts} " if prompts else ""
    return f"intervals are by a bootstrap over the {count}prompts, Wilson's where all prompts are alike"


def _table(evaluation: Mapping[str, Any]) -> Html:
    found = compared(evaluation)
    columns = [("Ties", TIES), ("Same in both orders", CONSISTENT)]
    columns = [(name, key) for name, key in columns if any(key in policy["metrics"] for policy in found)]
    heads = ["Policy", "Win rate", "95 % interval", *(name for name, _ in columns)]
    rows = [
        tag(
            "tr",
            tag("th", policy["name"], scope="row"),
            tag("td", outcome.write(outcome.number(policy["metrics"], "win_rate"), ".1%")),
            tag("td", _ends(policy)),
            [tag("td", outcome.write(outcome.number(policy["metrics"], key), ".0%")) for _, key in columns],
        )
        for policy in found
    ]
    return tag(
        "table",
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
        tag("tbody", rows),
    )


def _ends(policy: outcome.Policy) -> str:
    low, high = (outcome.finite(policy["metrics"], key) for key in (LOW, HIGH))
    return outcome.MISSING if low is None or high is None else f"{low:.1%} to {high:.1%}"


def _interval(policy: outcome.Policy) -> str:
    return f"{policy['metrics']['win_rate']:.1%} ({_ends(policy)})"
