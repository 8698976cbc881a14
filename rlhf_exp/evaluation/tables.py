"""Tables for the terminal. Print them with a rich Console: without a terminal they come out plain."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_exp.evaluation import outcome
from rlhf_exp.evaluation.text import is_empty

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PROMPT_CHARACTERS = 240
RESPONSE_CHARACTERS = 400
WIDTH, GAP = 78, 3  # of the summary, and between its columns
YIELDING = (
    "distinct_2",
    "empty_rate",
    "eos_rate",
)  # columns that go, in this order, until it fits; the report has all


def summary_table(evaluation: Mapping[str, Any]) -> Table:
    """Policies by metrics, and the data; a star marks the policy with the best gold score, the best reward.

    78 columns at most.
    """
    from rich.text import Text

    found = outcome.policies(evaluation)
    metrics = [metric for metric in outcome.measured(found) if metric.terminal]
    for key in YIELDING:
        if _width(outcome.rows(evaluation), metrics) > WIDTH:
            metrics = [metric for metric in metrics if metric.key != key]
    winners = {metric.key: outcome.best(found, metric) for metric in metrics}
    notes = ["± one standard error; * best of its column"] * any(winners.values())
    notes += [outcome.about_data(evaluation)] * ("data" in evaluation)
    table = _table(caption="\n".join(notes) or None)
    table.add_column("policy")  # where all else fails, a name wraps
    for metric in metrics:
        unit = f"\n{metric.unit}" if metric.unit else ""
        table.add_column(metric.short + unit, justify="right", no_wrap=True)
    for policy in outcome.rows(evaluation):
        cells = [Text(line_of(policy["name"]), style="bold")]
        for metric in metrics:
            star = winners[metric.key] is policy
            figure = _with_error(policy, metric)
            mark = "*" if star else " " if winners[metric.key] else ""
            cells.append(Text(figure + mark, style="bold green" if star else ""))
        table.add_row(*cells)
    return table


def table_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All figures of the policies and the data, a row each, with the same columns: for a tracker's table."""
    found = outcome.rows(evaluation)
    columns = dict.fromkeys(name for row in found for name in row["metrics"])
    return [
        {"policy": row["name"], "step": row.get("step")}
        | {name: row["metrics"].get(name) for name in columns}
        for row in found
    ]


def _width(rows: Iterable[outcome.Policy], metrics: Iterable[outcome.Metric]) -> int:
    """Columns of the terminal that the summary of these metrics takes, a star at every score."""
    rows = list(rows)
    widths = [max(len("policy"), *(len(line_of(row["name"])) for row in rows))]
    for metric in metrics:
        cells = [_with_error(row, metric) for row in rows]
        widths.append(max(len(metric.short), len(metric.unit), max(map(len, cells)) + metric.best))
    return sum(widths) + GAP * (len(widths) - 1)


def samples_table(evaluation: Mapping[str, Any], n: int = 3, policies: Iterable[str] | None = None) -> Table:
    """The first `n` prompts, each with the answers of the policies (by name; else up to four of them)."""
    from rich.text import Text

    names = outcome.sampled(evaluation, 4) if policies is None else list(policies)
    samples = list(evaluation.get("samples") or [])[: max(n, 0)]
    answers = [answer for sample in samples for answer in sample["responses"].values()]
    scores = [key for key in ("gold", "reward") if any(outcome.number(a, key) is not None for a in answers)]
    table = _table()
    table.add_column("", no_wrap=True)
    table.add_column("text", ratio=1, overflow="fold")
    for key in scores:
        table.add_column(key, justify="right", no_wrap=True)
    for sample in samples:
        prompt = _ends(line_of(sample["prompt"]), PROMPT_CHARACTERS)
        table.add_row(Text("prompt", style="dim"), Text(prompt, style="bold"), *([""] * len(scores)))
        for name in names:
            answer = sample["responses"].get(name)
            if answer is None:
                continue
            figures = [outcome.write(outcome.number(answer, key), "+.2f") for key in scores]
            table.add_row(Text(line_of(name), style="cyan"), _answer(answer), *figures)
        table.add_section()
    if not samples:
        table.add_row("", Text("no samples were kept", style="dim"), *([""] * len(scores)))
    return table


def line_of(text: str) -> str:
    """Text as one line that cannot steer a terminal: spaces and breaks become one space, control signs go."""
    kept = (" " if sign.isspace() else sign for sign in text)
    return " ".join("".join(s for s in kept if unicodedata.category(s) not in ("Cc", "Cf", "Cs")).split())


def _answer(answer: Mapping[str, Any]) -> Text:
    from rich.text import Text

    text = str(answer.get("text") or "")
    if is_empty(text):
        return Text("(empty)", style="dim italic")
    line = line_of(text)
    cut = line[:RESPONSE_CHARACTERS].rstrip() + " …" if len(line) > RESPONSE_CHARACTERS else line
    shown = Text(cut)
    if answer.get("ended") is False:
        shown.append(" (cut off)", style="dim italic")
    return shown


def _with_error(policy: outcome.Policy, metric: outcome.Metric) -> str:
    """`0.62 ±0.04` for the scores, the bare figure for the others: the line has to fit into 80 columns."""
    figure = outcome.shown(policy, metric)
    error = outcome.finite(policy["metrics"], f"{metric.key}_se") if metric.best else None
    return f"{figure} ±{outcome.write(error, metric.spec)}" if error else figure


def _ends(text: str, most: int) -> str:
    """Beginning and end of a long text: a prompt's last words are what the answer goes on from."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half].rstrip()} … {text[-half:].lstrip()}"


def _table(**options: Any) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        caption_style="dim",
        caption_justify="left",
        **options,
    )
