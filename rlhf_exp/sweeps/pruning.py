"""Values of a running trial, step by step, and what ends it early.

Two files in the trial's folder, so that it may run in this process, in another, or on another machine:

    values.jsonl   {"step", "value"} a line, written by the trial; of a step that came twice the later line counts
    prune          written by a sweeper: the trial saves and stops after its next step; its text is the reason

A trial also ends itself, under any sweeper: by `early_stop.rule`, or where a guard fires (`early_stop.guards`).

What early stopping means for the store. It changes nothing in a run that goes to its end, so `early_stop` is not in
the key; and a run that was stopped early is not the result of its key, so it is never published. It ends as one that
a signal stopped: a checkpoint of its last step, run.json KILLED with the reason, no manifest. Whoever asks for that
key again, by a command of its own or in another sweep, goes on from the checkpoint to the end, bit for bit as if it
had never stopped. In the sweep's ledger the trial is `stopped`, and a resumed sweep leaves it alone unless asked
(`python -m rlhf_exp.sweeps resume FOLDER --stopped`). Only what a trial is about can be stopped, nothing upstream of
it, which other trials stand on too. A guard whose action is `stop` is another thing: it belongs to the config, is
keyed, and its run is a finished one; the ledger calls the trial `stopped` as well, with the guard's reason.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_exp.schema import EarlyStop
from rlhf_exp.store import atomic
from rlhf_exp.store.runs import plain
from rlhf_exp.sweeps import current, figures, ledger

VALUES, PRUNE = "values.jsonl", "prune"
GUARD = "guard/"  # metrics of guards that fired


def report_intermediate(step: int, value: float) -> None:
    """Note a value of the running trial; nothing outside of a sweep."""
    trial = current.trial()
    if trial is not None:
        line = json.dumps(plain({"step": int(step), "value": float(value)}), allow_nan=False)
        ledger.write_line(trial.folder / VALUES, line)


def should_stop() -> str | None:
    """Why the running trial is to end; None: it goes on."""
    trial = current.trial()
    return asked(trial.folder) if trial is not None else None


def values(folder: Path) -> dict[int, float]:
    """Step -> value of a trial, as far as it is, by step; what was nan is left out."""
    found = {}
    for line in ledger.read_lines(Path(folder) / VALUES):
        if isinstance(line.get("step"), int) and isinstance(line.get("value"), int | float):
            found[line["step"]] = float(line["value"])
    return dict(sorted(found.items()))


def prune(folder: Path, reason: str) -> None:
    """Ask the trial of this folder to end (a sweeper does)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(Path(folder) / PRUNE, reason.encode())


def asked(folder: Path) -> str | None:
    """Why a trial was asked to end; None: it was not."""
    try:
        return (Path(folder) / PRUNE).read_text(encoding="utf-8") or "pruned"
    except (FileNotFoundError, NotADirectoryError):
        return None


def forget(folder: Path) -> None:
    """A trial that is run again was not asked yet."""
    (Path(folder) / PRUNE).unlink(missing_ok=True)


# ---------------------------------------------------------------- while a stage trains


@dataclass
class Watch:
    """The rules over one trial's steps."""

    config: EarlyStop
    trial: current.Trial
    names: tuple[str, ...] = figures.RUNNING  # the value is the first of these that a step has
    mine: dict[int, float] = field(default_factory=dict)
    known: dict[int, dict[int, float]] = field(default_factory=dict)  # values of the trials that are done

    def after(self, step: int, metrics: Mapping[str, object]) -> str | None:
        """Note the step's value; why the trial is to end here, None: it goes on."""
        wanted = (self.config.metric,) if self.config.metric else self.names
        name = next((name for name in wanted if name in metrics), "")
        value = metrics.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            self.mine[step] = float(value)
            report_intermediate(step, value)
        if reason := should_stop():
            return reason
        if self.config.guards and (fired := [key for key in metrics if key.startswith(GUARD)]):
            return f"guard {fired[0].removeprefix(GUARD)} fired (early_stop.guards)"
        if name and self.config.rule == "median" and step > self.config.grace:
            return self._median(step, name)
        return None

    def _median(self, step: int, name: str) -> str | None:
        others = list(self._done().values())
        found = median_rule(self.mine, others, step, lower=name.endswith("loss"), least=self.config.trials)
        if found is None:
            return None
        best, median = found
        return (
            f"best {name} so far {best:.4g}, the median of {len(others)} trials that are done is {median:.4g} "
            "(early_stop.rule=median)"
        )

    def _done(self) -> dict[int, dict[int, float]]:
        for number, state in ledger.states(self.trial.sweep).items():
            new = state.status == ledger.DONE and number != self.trial.number and number not in self.known
            if new and (found := values(self.trial.sweep / str(number))):
                self.known[number] = found
        return self.known


def median_rule(
    mine: Mapping[int, float], others: list[dict[int, float]], step: int, *, lower: bool, least: int
) -> tuple[float, float] | None:
    """(best value so far, median of the others' running averages) if the first is strictly worse; None: go on.

    Golovin et al. 2017, section 3.2.1: a trial is stopped at step s if its best value by step s is strictly worse
    than the median of the running averages over steps 1 .. s of all completed trials. lower: the smaller value is the
    better one. least: with fewer completed trials that have a value by then nobody is stopped.
    """
    averages = []
    for curve in others:
        upto = [value for at, value in curve.items() if at <= step]
        if upto:
            averages.append(sum(upto) / len(upto))
    own = [value for at, value in mine.items() if at <= step]
    if len(averages) < least or not own:
        return None
    best, median = (min(own) if lower else max(own)), statistics.median(averages)
    return (best, median) if (best > median if lower else best < median) else None


_watch: ContextVar[Watch | None] = ContextVar("the rules over the running trial", default=None)


@contextmanager
def watched(config: EarlyStop | None, rounds: int = 1) -> Iterator[None]:
    """Within the block steps are looked at, if this is a trial; None: they are not, it is upstream of one.

    rounds: of rft.
    """
    trial = current.trial()
    found = None
    if trial is not None and config is not None:
        known = values(trial.folder)  # of an earlier attempt
        found = Watch(config, trial, figures.running(rounds), known)
    token = _watch.set(found)
    try:
        yield
    finally:
        _watch.reset(token)


def after(step: int, metrics: Mapping[str, object]) -> str | None:
    """What a stage asks after each step: why its trial is to end here, None: it goes on."""
    found = _watch.get()
    return found.after(step, metrics) if found is not None else None


def copy(folder: Path, lines: list[dict[str, object]], names: Iterable[str]) -> None:
    """The values of a trial whose run was there already, from its metrics.jsonl: of the first of `names` in it."""
    if (Path(folder) / VALUES).exists():
        return
    name = next((name for name in names if any(name in line for line in lines)), "")
    rows = [
        {"step": int(line["step"]), "value": line[name]} for line in lines if name in line and "step" in line
    ]
    if rows:
        text = "".join(f"{json.dumps(plain(row), allow_nan=False)}\n" for row in rows)
        atomic.write_bytes(Path(folder) / VALUES, text.encode())
