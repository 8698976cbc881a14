"""The table of a sweep: a row a trial, what was swept, what came of it, and why some failed.

The same rows go to the terminal (rich), to table.md and to table.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.progress import duration
from rlhf_exp.store import atomic
from rlhf_exp.sweeps import ledger, trial
from rlhf_exp.sweeps.ledger import State

MARKDOWN, JSON = "table.md", "table.json"
COLOURS = {ledger.DONE: "green", ledger.FAILED: "red", ledger.STOPPED: "yellow", ledger.INTERRUPTED: "yellow"}
GONE = "its process is gone"
NOT_SHOWN = "-"
LEAST = 12  # letters of a swept value that are not broken: any number that was shortened


def values_of(overrides: Sequence[str]) -> dict[str, str]:
    """key -> value as it was written, without the backslashes of Hydra's grammar."""
    pairs = (line.lstrip("+~").partition("=") for line in overrides)
    return {key: re.sub(r"\\([\\:,=()\[\]{} ])", r"\1", value) for key, _, value in pairs}


def swept(states: Mapping[int, State]) -> list[str]:
    """The keys in which the trials differ, in the order of the overrides."""
    each = [values_of(state.overrides) for state in states.values()]
    keys = dict.fromkeys(key for values in each for key in values)
    return [key for key in keys if len({values.get(key) for values in each}) > 1]


def rows(sweep: Path) -> list[dict[str, Any]]:
    """A dict a trial: number, overrides (those in which trials differ), status, objective, gold, kl, seconds ...

    A trial that a process of this machine was running and that no process runs any more is `interrupted`.
    """
    states = ledger.states(sweep)
    keys = swept(states)
    found = []
    for number, state in states.items():
        values = values_of(state.overrides)
        status, reason = state.status, state.reason
        if status == ledger.RUNNING and _is_gone(sweep, state):
            status, reason = ledger.INTERRUPTED, GONE
        end = state.end if status not in (ledger.RUNNING, ledger.SUBMITTED, ledger.WAITING) else {}
        found.append(
            {
                "trial": number,
                "overrides": {key: values[key] for key in keys if key in values},
                "status": status,
                **{name: end.get(name) for name in ("objective", "metric", "gold", "kl")},
                "seconds": round(state.seconds, 1) if state.seconds else None,
                "reason": reason,
                "job": state.job,
                "bad_input": bool(end.get("bad_input")),
                "run": end.get("run"),
            }
        )
    return found


def _is_gone(sweep: Path, state: State) -> bool:
    import socket

    return state.host == socket.gethostname() and not trial.is_running(sweep / str(state.number))


def metric(found: Sequence[Mapping[str, Any]]) -> str:
    """What the objective is, where it is one thing."""
    names = dict.fromkeys(row["metric"] for row in found if row["metric"])
    return next(iter(names)) if len(names) == 1 else "objective"


def header(found: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = list(dict.fromkeys(key for row in found for key in row["overrides"]))
    return ["trial", *keys, "status", metric(found), "gold", "KL", "time"]


def shortened(values: Sequence[str]) -> list[str]:
    """Long decimals rounded to four digits, or to so many more that those which differ still do."""
    for digits in (4, 6, 9, 12):
        found = [_rounded(value, digits) for value in values]
        if len(set(found)) == len(set(values)):
            return found
    return list(values)


def _rounded(value: str, digits: int) -> str:
    if value.lstrip("+-").isdecimal():  # a seed
        return value
    try:
        found = f"{float(value):.{digits}g}"
    except ValueError:
        return value
    return found if len(found) < len(value) else value


def body(found: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[list[str]]:
    """The cells of all rows, the numbers of a column in the same manner."""
    columns = {key: shortened([row["overrides"].get(key, NOT_SHOWN) for row in found]) for key in keys}
    return [
        cells({**row, "overrides": {key: columns[key][place] for key in keys}}, keys)
        for place, row in enumerate(found)
    ]


def cells(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """A row's cells as text."""
    figures = [NOT_SHOWN if row[name] is None else f"{row[name]:.4g}" for name in ("objective", "gold", "kl")]
    time = duration(row["seconds"]) if row["seconds"] else NOT_SHOWN
    return [
        str(row["trial"]),
        *(row["overrides"].get(key, NOT_SHOWN) for key in keys),
        row["status"],
        *figures,
        time,
    ]


def terminal(found: Sequence[Mapping[str, Any]]) -> Any:
    """The table for a rich Console."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    names = header(found)
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    keys = names[1:-5]
    lines = body(found, keys)
    empty = {
        place
        for place, name in enumerate(names)
        if name in ("gold", "KL") and all(line[place] == NOT_SHOWN for line in lines)
    }
    for place, name in enumerate(names):
        if place in empty:
            continue
        short = name not in keys or all(len(line[place]) <= LEAST for line in lines)
        shown.add_column(
            name.replace(".", ".\n").replace("/", "/\n"),
            justify="left" if name in ("status", *keys) else "right",
            no_wrap=short,
            overflow="ellipsis" if short else "fold",  # of a figure never a part, as if it were the whole
        )
    for row, line in zip(found, lines, strict=True):
        colour = COLOURS.get(row["status"], "cyan")
        filled = [cell for place, cell in enumerate(line) if place not in empty]
        shown.add_row(*(Text(cell, style=colour if cell == row["status"] else "") for cell in filled))
    return shown


def problems(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each trial that was not done: which, and why."""
    lines = []
    for row in found:
        if row["reason"]:
            named = " ".join(f"{key}={value}" for key, value in row["overrides"].items())
            lines.append(
                f"trial {row['trial']}{f' ({named})' if named else ''} {row['status']}: {row['reason']}"
            )
    return lines


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The table and its problems as Markdown."""
    names = header(found)
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join("---" for _ in names) + "|"]
    lines += ["| " + " | ".join(map(_escaped, line)) + " |" for line in body(found, names[1:-5])]
    if wrong := problems(found):
        lines += ["", *(f"- {line}" for line in wrong)]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write(sweep: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """table.md and table.json in the sweep's folder."""
    text = json.dumps(list(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic.write_bytes(sweep / JSON, text.encode())
    atomic.write_bytes(sweep / MARKDOWN, markdown(found).encode())
