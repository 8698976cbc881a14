"""The jobs of a sweep as a table, in a terminal or as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.jobs.watch import Row
from rlhf_exp.sweeps import ledger
from rlhf_exp.sweeps.table import swept, values_of

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {
    ledger.DONE: "green",
    ledger.STOPPED: "yellow",
    ledger.FAILED: "red",
    ledger.INTERRUPTED: "red",
    ledger.RUNNING: "cyan",
}


def table(sweep: Path, rows: Sequence[Row], note: str = "") -> Table:
    """A line for each job, upstream stages first; of trials what they differ in."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    differ = set(swept(ledger.states(sweep)))
    found = Table(
        title=str(sweep),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        caption=summary(rows) + note,
        caption_justify="left",
    )
    for name in ("", "what", "job", "status", "node", "time", "starts", "objective", "why"):
        right = name in ("", "time", "starts", "objective")
        found.add_column(
            name, justify="right" if right else "left", overflow="fold", no_wrap=name in ("job", "status")
        )
    for row in rows:
        unit = row.unit
        chosen = [f"{key}={value}" for key, value in values_of(unit.overrides).items() if key in differ]
        what = unit.name if unit.number is None else " ".join(chosen).replace("\\:", ":") or unit.stage
        found.add_row(
            "" if unit.number is None else str(unit.number),
            Text(what),
            unit.job or "",
            Text(row.status, style=COLOURS.get(row.status, "")),
            (row.state.nodes if row.state is not None else "") or unit.host or "",
            clock(row),
            str(unit.starts or ""),
            number_of(unit.end.get("objective")),
            Text(row.why),
        )
    return found


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
