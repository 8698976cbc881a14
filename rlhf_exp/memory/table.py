"""The memory plan as text: a table by role and kind, then each phase's sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO

from rlhf_exp.memory.counted import Item, phases

WIDTH = 110  # columns, wherever it is printed: in a log too


def gigabytes(value: float) -> str:
    """2.10 GB, or MB below one tenth, kB below a tenth of that."""
    if value >= 1e8:
        return f"{value / 1e9:.2f} GB"
    return f"{value / 1e6:.0f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def lines(
    title: str, alone: Sequence[Item], rank: Sequence[Item], host: Sequence[Item], ranks: int
) -> Iterator[str]:
    """alone: of one process that has all rows; rank, host: of each of several."""
    from rich.table import Table

    yield title
    table = Table(show_edge=False, pad_edge=False)
    for name in ("role", "what", "when"):
        table.add_column(name)
    columns = ["one process"] + ["each rank"] * (ranks > 1 or bool(host)) + ["its host"] * bool(host)
    for name in columns:
        table.add_column(name, justify="right")
    single, parted, kept = (_summed(items) for items in (alone, rank, host))
    for key in dict.fromkeys([*single, *parted, *kept]):
        role, what, when = key
        cells = [single, parted, kept][: len(columns)]
        table.add_row(role, what, when, *(gigabytes(cell[key]) if key in cell else "" for cell in cells))
    table.add_section()
    for phase in phases([*alone]):
        sums = [sum(i.bytes for i in items if i.there(phase)) for items in (alone, rank, host)][
            : len(columns)
        ]
        table.add_row("sum", "", phase, *map(gigabytes, sums))
    yield from printed(table)


def _summed(items: Iterable[Item]) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], float] = {}
    for item in items:
        what = f"{item.kind}, {item.label}" if item.label else item.kind
        key = (item.role, what, ", ".join(item.phases) or "always")
        found[key] = found.get(key, 0.0) + item.bytes
    return {key: value for key, value in found.items() if value}


def printed(table: object) -> list[str]:
    from rich.console import Console

    page = StringIO()
    Console(file=page, width=WIDTH, color_system=None).print(table)
    return [line.rstrip() for line in page.getvalue().splitlines()]
