"""The jobs of a sweep as its ledger leaves them: trials by their number, upstream stages by their name.

`sweeps.ledger.states` knows trials; here are also the jobs, and how often they were put back into the queue. Events
of upstream jobs have `upstream` in the place of `number`. `lost`: an `ended` that the job's process could not write
itself, because it was killed, cancelled, or went with its node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp.sweeps import ledger

REQUEUED = "requeued"
FINAL = (ledger.DONE, ledger.FAILED, ledger.STOPPED)


@dataclass
class Unit:
    """One job: a trial ("3") or an upstream stage ("sft-12ab34ef")."""

    name: str
    number: int | None = None
    overrides: list[str] = field(default_factory=list)
    stage: str = ""
    job: str | None = None  # as SLURM counts: 16, or 17_3 of an array
    after: list[str] = field(default_factory=list)  # upstream jobs that it waits for
    starts: int = 0  # of this job
    restarts: int = 0
    host: str | None = None
    end: dict[str, Any] = field(default_factory=dict)  # the last `ended` after the last start

    @property
    def status(self) -> str:
        """The ledger's word; what SLURM says comes on top of it."""
        if self.end:
            return str(self.end["status"])
        if self.starts:
            return ledger.RUNNING
        return ledger.SUBMITTED if self.job else ledger.WAITING

    @property
    def ended(self) -> bool:
        """Whether nothing more comes: an interrupted job goes on, unless SLURM has lost it."""
        return bool(self.end) and (self.end["status"] in FINAL or bool(self.end.get("lost")))

    @property
    def open(self) -> bool:
        """Whether it waits or runs, as far as the ledger knows."""
        return self.job is not None and not self.ended

    @property
    def done(self) -> bool:
        return self.ended and self.end["status"] in ledger.SETTLED

    @property
    def reason(self) -> str:
        return str(self.end.get("reason") or "")

    @property
    def who(self) -> dict[str, Any]:
        """How the ledger's events name it."""
        return {"upstream": self.name} if self.number is None else {"number": self.number}


def read(sweep: Path) -> dict[str, Unit]:
    """All units in the order in which they were first heard of."""
    return fold(ledger.read(sweep))


def fold(events: Iterable[dict[str, Any]]) -> dict[str, Unit]:
    """What the events come to. A `submitted` after the job's own `started` or `ended` came late, and ends nothing."""
    found: dict[str, Unit] = {}
    begun: Counter[tuple[str, str]] = Counter()  # starts of a job; there also if it ended without one
    for event in events:
        number, upstream = event.get("number"), event.get("upstream")
        if not isinstance(number, int) and upstream is None:
            continue
        name = str(upstream if number is None else number)
        unit = found.setdefault(name, Unit(name, number))
        kind = event.get("event")
        if kind in (ledger.STARTED, ledger.ENDED):
            begun[name, str(event.get("job"))] += kind == ledger.STARTED
        if kind == ledger.TRIAL:
            unit.overrides = [str(line) for line in event.get("overrides") or ()]
        elif kind == ledger.SUBMITTED:
            unit.job, unit.stage = str(event["job"]), str(event.get("stage") or "")
            unit.after = list(event.get("after") or ())
            unit.starts = begun[name, unit.job]
            unit.restarts = max(unit.starts - 1, 0)
            if (name, unit.job) not in begun:
                unit.end, unit.host = {}, None
        elif kind == ledger.STARTED:
            unit.starts, unit.host, unit.end = unit.starts + 1, event.get("host"), {}
            unit.restarts = max(unit.restarts, unit.starts - 1)
        elif kind == REQUEUED:
            unit.restarts = int(event.get("restart") or 0)
        elif kind == ledger.ENDED:
            unit.end = event
    return found
