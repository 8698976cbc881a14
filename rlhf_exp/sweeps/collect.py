"""The beginning and the end of a sweep as others see it: its run in MLflow, its table, its report.

MLflow's run of the sweep is open until no trial is waiting any more; all runs of its trials are its children.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.schema import Tracking
from rlhf_exp.store.frozen import without_password
from rlhf_exp.store.runs import RunFolder
from rlhf_exp.sweeps import folder, ledger, table, trial
from rlhf_exp.tracking import Tracker, how_to_open, open_tracker, require_store, tracking_uri

EXIT_FAILED = 1
REPORT = "report"
OPEN = (ledger.WAITING, ledger.SUBMITTED, ledger.RUNNING)  # not ended


def begin(path: Path, run: Any, swept: Sequence[str]) -> Tracker:
    """Open MLflow's run of the sweep, or go on with it; its id is in sweep.json. run: the first trial's config."""
    known = folder.update(path, swept=list(dict.fromkeys(swept)))
    require_store(run.tracking, run.output_dir)
    keys = ", ".join(dict.fromkeys(swept)) or run.stage
    tags = {
        "sweep.role": "sweep",
        "sweep.folder": str(path),
        "sweep.keys": keys,
        "sweep.command": without_password(shlex.join(["python", "-m", "rlhf_exp", *known["argv"]])),
        "stage": f"sweep of {run.stage}",
    }
    name = f"sweep {keys} {path.name}"
    found = open_tracker(run.tracking, run.output_dir, name, tags, run_id=known.get("mlflow_run_id"))
    if found.run_id:
        folder.update(path, mlflow_run_id=found.run_id)
    return found


def end(path: Path, parent: Tracker, interrupted: bool = False) -> int:
    """Write and show the table, make the report, end MLflow's run if nothing waits; returns the exit code.

    interrupted: this process was asked to stop, so that what waits for it waits no more; jobs in a queue go on.
    """
    rows = table.rows(path)
    table.write(path, rows)
    if any(row["status"] not in OPEN for row in rows):
        show(rows)
    made = report(path)
    for name in (table.MARKDOWN, table.JSON):
        parent.artifact(path / name)
    if made is not None:
        parent.artifact(made, REPORT)
    counts = count(rows)
    parent.tags({f"sweep.{status}": number for status, number in counts.items()})
    failed = [row for row in rows if row["status"] == ledger.FAILED]
    left = [row for row in rows if row["status"] not in (*ledger.SETTLED, ledger.FAILED)]
    queued = any(state.open for state in ledger.states(path).values())
    waits = queued or (any(row["status"] in OPEN for row in rows) and not interrupted)
    if waits:
        parent.flush()
    else:
        parent.finish("KILLED" if left else "FAILED" if failed else "FINISHED")
    say(f"\nsweep        {path}")
    say(f"table        {path / table.MARKDOWN}")
    if made is not None:
        say(f"report       {made / 'report.html'}")
    if uri := _uri(path):
        say(f"mlflow       {how_to_open(uri)}")
    for row in failed:
        named = " ".join(ledger.states(path)[row["trial"]].overrides)
        print(f"error: trial {row['trial']} ({named}): {row['reason']}", file=sys.stderr)
    if waits:
        look = "jobs status" if any(row["job"] for row in rows) else "sweeps show"
        say(f"{len(left)} of {len(rows)} trials have not ended; see: python -m rlhf_exp.{look} {_q(path)}")
    elif left or failed:
        say(f"{len(left) + len(failed)} of {len(rows)} trials are not done; go on: {resume_command(path)}")
    if left and not waits:
        return EXIT_FAILED
    if not failed:
        return 0
    return EXIT_BAD_INPUT if all(row["bad_input"] for row in failed) else EXIT_FAILED


def count(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Status -> how many."""
    found: dict[str, int] = {}
    for row in rows:
        found[row["status"]] = found.get(row["status"], 0) + 1
    return found


def resume_command(path: Path) -> str:
    return f"python -m rlhf_exp.sweeps resume {_q(path)}"


def _q(path: Path) -> str:
    return shlex.quote(str(path))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table on the screen, and why some trials are not done."""
    from rich.console import Console

    Console().print(table.terminal(rows))
    for line in table.problems(rows):
        say(line)


def say(line: str) -> None:
    print(line, flush=True)


def config_of(path: Path) -> Any | None:
    """The config of the sweep's first trial; None if there is none that can be read."""
    for place in folder.trials(path):
        try:
            return trial.config_of(trial.read(place))
        except InputError:
            continue
    return None


def _uri(path: Path) -> str | None:
    run = config_of(path)
    return tracking_uri(run.tracking, run.output_dir) if run is not None else None


def report(path: Path) -> Path | None:
    """The frontier report of all trials that have a policy, in the sweep's folder; None: there is none."""
    from rlhf_exp.evaluation import trials
    from rlhf_exp.schema import ReportRun
    from rlhf_exp.stages import report as stage
    from rlhf_exp.stages import report_inputs

    try:
        config = ReportRun(stage="report", inputs=str(path), tracking=Tracking(backend="none"))
        found = report_inputs.find(config)
        read, notes = trials.read(found.entries, config.report.samples)
    except InputError:  # nothing was made, or nothing that has a policy
        return None
    if not read:
        return None
    stage.write(config, RunFolder(path), read, [*found.notes, *notes])
    return path / stage.REPORT


def again(path: Path) -> int:
    """Collect a sweep whose trials ran elsewhere, in MLflow's run that it has."""
    run = config_of(path)
    if run is None:
        raise InputError(f"{path}: there is no trial in it")
    return end(path, begin(path, run, table.swept(ledger.states(path))))
