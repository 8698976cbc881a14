"""The jobs of a sweep as a table, in a terminal or as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.jobs.watch import Row
from rlhf_exp.sweeps import ledger
from rlhf_exp.sweeps.table import shortened, swept, values_of

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {
    ledger.DONE: "green",
    ledger.STOPPED: "yellow",
    ledger.FAILED: "red",
    ledger.INTERRUPTED: "red",
    ledger.RUNNING: "cyan",
}
COLUMNS = ("", "what", "job", "status", "node", "time", "starts", "objective", "why")
ALWAYS = ("", "what", "job", "status")
FIGURES = ("job", "status", "time", "starts", "objective")  # never broken


def table(sweep: Path, rows: Sequence[Row], note: str = "") -> Table:
    """A line for each job, upstream stages first; of trials what they differ in."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    differ = swept(ledger.states(sweep))
    names = named(rows, differ)
    found = Table(
        title=str(sweep),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        caption=summary(rows) + note,
        caption_justify="left",
    )
    lines = [cells(row, names) for row in rows]
    # a terminal is narrow: what nobody has takes no place
    shown = [name for name in COLUMNS if name in ALWAYS or any(line[name] for line in lines)]
    for name in shown:
        figure, right = name in FIGURES, name in ("", "time", "starts", "objective")
        found.add_column(
            name,
            justify="right" if right else "left",
            overflow="ellipsis" if figure else "fold",
            no_wrap=figure,
        )
    for line in lines:
        texts = [Text(line[name]) for name in shown]
        texts[shown.index("status")].stylize(COLOURS.get(line["status"], ""))
        found.add_row(*texts)
    return found


def cells(row: Row, names: Mapping[int, str]) -> dict[str, str]:
    """A row's cells by column. names: what each trial is called."""
    unit = row.unit
    return {
        "": "" if unit.number is None else str(unit.number),
        "what": unit.name if unit.number is None else names[unit.number] or unit.stage,
        "job": unit.job or "",
        "status": row.status,
        "node": (row.state.nodes if row.state is not None else "") or unit.host or "",
        "time": clock(row),
        "starts": str(unit.starts) if unit.starts > 1 else "",
        "objective": number_of(unit.end.get("objective")),
        "why": row.why,
    }


def named(rows: Sequence[Row], keys: Sequence[str]) -> dict[int, str]:
    """Number of a trial -> what it has of these keys, by their last word: `kl_coef=0.1`."""
    trials = [row.unit for row in rows if row.unit.number is not None]
    found: dict[int, list[str]] = {unit.number: [] for unit in trials}
    endings = Counter(key.rpartition(".")[2] for key in keys)
    for key in keys:
        short = key.rpartition(".")[2]
        name = short if endings[short] == 1 else key
        having = {unit.number: values_of(unit.overrides).get(key) for unit in trials}
        texts = shortened([value or "" for value in having.values()])
        for number, text in zip(having, texts, strict=True):
            if having[number] is not None:
                found[number].append(f"{name}={text}")
    return {number: " ".join(parts) for number, parts in found.items()}


def clock(row: Row) -> str:
    """Of what runs, since when; of what has ended, for how long its last attempt went on."""
    seconds = row.unit.end.get("seconds")
    if row.unit.ended:
        return "" if seconds is None else f"{seconds:.0f} s"
    return row.state.time if row.state is not None and row.status == "running" else ""


def number_of(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else ""


def summary(rows: Sequence[Row]) -> str:
    """`6 trials: 4 done, 1 failed, 1 running; upstream: 1 done`."""
    parts = []
    for label, chosen in (
        ("trial", [row for row in rows if row.unit.number is not None]),
        ("upstream job", [row for row in rows if row.unit.number is None]),
    ):
        counts = Counter(row.status for row in chosen)
        if chosen:
            parts.append(
                f"{len(chosen)} {label}{'s' * (len(chosen) > 1)}: "
                + ", ".join(f"{count} {name}" for name, count in counts.items())
            )
    return "; ".join(parts) or "no trials"
