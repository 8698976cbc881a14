"""How each job stands, from the ledger and SLURM together; what a process could not say itself goes into the ledger.

The ledger is believed first: what a process wrote about its end is true whatever SLURM calls it. Where SLURM says
that a job has ended and the ledger does not, the process had no chance: it was cancelled, killed, or went with its
node. That is entered within seconds, so that nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.jobs import states, units
from rlhf_exp.jobs.states import NEVER, NoAnswer, State
from rlhf_exp.jobs.units import Unit
from rlhf_exp.sweeps import ledger

GRACE = 1.0  # seconds that an ending may take from a node's file system to this one
HELD = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "launch_failed_requeued_held")


@dataclass
class Row:
    """A job for people."""

    unit: Unit
    state: State | None  # None: SLURM was not asked, or did not answer

    @property
    def status(self) -> str:
        """The ledger's word for what has ended, SLURM's for what has not."""
        if self.unit.ended or self.state is None or self.unit.job is None:
            return self.unit.status
        if self.state.name == "PENDING" and self.unit.restarts:
            return "requeued"
        return {"PENDING": "waiting"}.get(self.state.name, self.state.name.lower())

    @property
    def why(self) -> str:
        """Why it failed, or what it waits for."""
        if self.unit.ended or self.state is None:
            return self.unit.reason
        reason = self.state.reason
        if reason in HELD:
            return f"held ({reason}): scontrol release {self.unit.job}"
        if reason == "Dependency" and self.unit.after:
            return f"waits for {', '.join(self.unit.after)}"
        return reason


def look(sweep: Path) -> list[Row]:
    """Every job of the sweep, trials last; jobs that were lost are entered in the ledger. NoAnswer as `query`."""
    known = units.read(sweep)
    found = states.query([unit.job for unit in known.values() if unit.open])
    if lost := [unit.name for unit in known.values() if unit.open and found[unit.job].ended]:
        time.sleep(GRACE)
        known = units.read(sweep)  # who has written meanwhile is not lost
        for name in lost:
            unit = known[name]
            if unit.open and found.get(unit.job, State("")).ended:
                _lose(sweep, unit, found[unit.job], known)
        known = units.read(sweep)
    return _rows(known, found)


def offline(sweep: Path) -> list[Row]:
    """What the ledger alone says."""
    return _rows(units.read(sweep), {})


def _rows(known: dict[str, Unit], found: dict[str, State]) -> list[Row]:
    rows = [Row(unit, found.get(unit.job or "")) for unit in known.values()]
    return sorted(rows, key=lambda row: (row.unit.number is not None, row.unit.number or 0))


def _lose(sweep: Path, unit: Unit, state: State, known: dict[str, Unit]) -> None:
    """Enter how a job ended that did not say so itself."""
    reason = state.said()
    bad = [name for name in unit.after if name in known and known[name].ended and not known[name].done]
    if not unit.starts and (bad or state.reason == NEVER):
        reason = f"not started: {', '.join(bad) or 'what it depends on'} did not end well"
    again = state.name == "CANCELLED" and unit.starts  # what it saved stays
    ledger.append(
        sweep,
        ledger.ENDED,
        **unit.who,
        status=ledger.INTERRUPTED if again else ledger.FAILED,
        reason=f"{reason} (job {unit.job})",
        lost=state.name,
    )


def wait(
    sweep: Path,
    numbers: Collection[int],
    poll: float,
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> dict[int, Unit]:
    """Look until these trials have ended, saying what changes; poll: seconds between two looks."""
    told: dict[str, str] = {}
    silent = False
    while True:
        try:
            rows = look(sweep)
            silent = False
        except NoAnswer as error:
            if not silent:
                say(f"SLURM does not answer, asking again: {error}")
            silent = True
            rows = offline(sweep)
        for row in rows:
            words = line(row)
            if row.unit.job and told.get(row.unit.name) != words and not (silent and not row.unit.ended):
                told[row.unit.name] = words
                say(words)
        found = {row.unit.number: row.unit for row in rows if row.unit.number in numbers}
        if all(number in found and not found[number].open for number in numbers):
            return found
        pause(poll)


def line(row: Row) -> str:
    """A job's state for a log."""
    unit = row.unit
    name = f"trial {unit.number}" if unit.number is not None else unit.name
    where = f" on {row.state.nodes}" if row.state is not None and row.state.nodes and not unit.ended else ""
    why = f": {row.why}" if row.why else ""
    return f"{name} (job {unit.job}): {row.status}{where}{why}"
