"""The report stage: many runs read and compared, scores against KL; nothing is loaded, nothing trained.

In: run folders, however they ended. Out: outputs/report/<key>/report with report.html, pictures and tables; the key
is of what was read, so that the same runs make the same report once.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.evaluation import comparison, frontier_lines, frontier_page, frontier_tables, trials
from rlhf_exp.evaluation.trials import Trial
from rlhf_exp.schema import ReportRun
from rlhf_exp.stages import STAGES, report_inputs
from rlhf_exp.store.frozen import freeze
from rlhf_exp.store.keys import run_key
from rlhf_exp.store.locks import build_lock
from rlhf_exp.store.preflight import require_writable
from rlhf_exp.store.runs import FAILED, FINISHED, KILLED, RunFolder, find, run_folder
from rlhf_exp.tracking import how_to_open, open_tracker, tracked, tracking_uri

REPORT, TABLES, PAGE = "report", "tables", "report.html"


def run(config: ReportRun) -> float | None:
    """Make the report; returns the best score of its first picture, None where there is none.

    Raises InputError, with every problem, before anything is written.
    """
    require_writable(config.output_dir)
    found = report_inputs.find(config)
    read, notes = trials.read(found.entries, config.report.samples)
    read += found.trials
    if not read:
        raise InputError(
            f"inputs={comparison.written(config.inputs)}: {len(found.entries)} runs, but none that trained or "
            "evaluated a policy"
        )
    if all(trial.state == trials.CORRUPT for trial in read):
        raise InputError([f"{trial.path}: {trial.reason}" for trial in read])
    if problems := list(unmeasured(config, read)):
        raise InputError(problems)
    notes = [*found.notes, *notes]
    say(f"report of {len(read)} run{'s' * (len(read) != 1)}: {counted(read)}")
    if config.dry_run:
        for trial in read:
            say(f"{trial.state:8s} {trial.name}  {trial.path}" + f"  {trial.reason}" * bool(trial.reason))
        return None
    key = run_key(
        config,
        dtype="none",
        base="none",
        data={trial.path: trial.digest for trial in read},
        parents={},
        version=STAGES["report"].version,
        extra={str(i): note for i, note in enumerate(notes)},
    )
    folder = find(config.output_dir, "report", key)
    if folder is None:
        folder = make(config, key, read, notes)
    show(config, folder)
    return folder.read().get("metrics", {}).get("best")


def unmeasured(config: ReportRun, read: list[Trial]) -> Iterator[str]:
    """That no run has a metric for an axis, where runs have some: a line for each axis, with those that there are."""
    rows = [row for trial in read if not trial.lost for source in trial.rows.values() for row in source]
    there = {name for row in rows for name in row.metrics}
    report = config.report
    for key, names in (("objectives", report.objectives), ("kl", [report.kl])):
        if there and there.isdisjoint(names):
            given = comparison.written(report.objectives if key == "objectives" else report.kl)
            others = {report.kl} if key == "objectives" else set()
            shown = sorted((name for name in there - others if not name.endswith("_se")), key=_of_logs)
            yield f"report.{key}={given}: no run has such a metric; there are {', '.join(shown)}"


def _of_logs(name: str) -> tuple[bool, str]:
    """Metrics of evaluations, and their names in training curves, come before what only training logs."""
    return "/" in name, name


def say(line: str) -> None:
    print(line, flush=True)


def counted(read: list[Trial]) -> str:
    """`3 finished, 1 failed`."""
    states = [trial.state for trial in read]
    return ", ".join(f"{states.count(state)} {state.lower()}" for state in dict.fromkeys(states))


def make(config: ReportRun, key: str, read: list[Trial], notes: list[str]) -> RunFolder:
    """Compare, draw, write, and send it all to the tracker."""
    folder = run_folder(config.output_dir, "report", key)
    name = config.run_name or f"report {key[:6]}"
    tags = {"stage": "report", "key": key, "folder": str(folder.path.absolute())}
    with build_lock(folder.path, say):
        if (
            there := find(config.output_dir, "report", key)
        ) is not None:  # built by another process meanwhile
            return there
        tracker = open_tracker(config.tracking, config.output_dir, name, tags)
        with tracked(tracker):
            folder.start(inputs(read, folder.path), mlflow_run_id=tracker.run_id)
            try:
                freeze(folder, config, sys.argv[1:])
                metrics = write(config, folder, read, notes)
            except (KeyboardInterrupt, SystemExit):
                folder.fail(KILLED, "stopped by a signal")
                raise
            except BaseException as error:
                folder.fail(FAILED, f"{type(error).__name__}: {error}")
                raise
            folder.finish(metrics)
            tracker.metrics({f"final/{name}": value for name, value in metrics.items()}, step=0)
            tracker.artifact(folder.path / REPORT, REPORT)
    return folder


def inputs(read: list[Trial], path: Path) -> dict[str, Any]:
    """What run.json says of the runs: finished ones are parents, which gc keeps as long as the report is there."""
    data = {trial.name: trial.digest for trial in read}
    parents = {
        trial.name: {"stage": trial.stage, "key": trial.key, "path": trial.path}
        for trial in read
        if trial.state == FINISHED
    }
    return {"base": {}, "data": data, "parents": parents}


def write(config: ReportRun, folder: RunFolder, read: list[Trial], notes: list[str]) -> dict[str, float]:
    """report.html, the tables as CSV, the pictures as PNG; returns the metrics of the run."""
    groups = comparison.groups(read)
    pictures = frontier_lines.pictures(groups, config.report)
    tables = frontier_tables.tables(groups, pictures, config.report.objectives)
    with folder.publish(REPORT) as place:
        (place / TABLES).mkdir()
        for name, rows in tables.items():
            (place / TABLES / f"{name}.csv").write_text(frontier_tables.as_csv(rows), encoding="utf-8")
        from rlhf_exp.evaluation import frontier_png  # imports matplotlib

        frontier_png.write(place, pictures)
        page = frontier_page.Report(
            title=title(config, read),
            groups=groups,
            pictures=pictures,
            tables=tables,
            warnings=[*comparison.warnings(read), *_failures(read), *notes],
            facts=facts(config, folder, read),
            fit=config.report.fit,
        )
        (place / PAGE).write_text(frontier_page.page(page), encoding="utf-8")
    metrics: dict[str, float] = {"runs": float(len(read)), "pictures": float(len(pictures))}
    if pictures and pictures[0].pareto:
        top = pictures[0].pareto[-1].point
        metrics = (
            {"best": top.score, "best_kl": top.kl}
            | ({"best_kl_is_bound": 1.0} if top.bound else {})
            | metrics
        )
    return metrics


def _failures(read: list[Trial]) -> list[str]:
    """A sentence for each run that gives no figures, or only some."""
    return [
        f"{trial.name} is {trial.state.lower()}{f': {trial.reason}' if trial.reason else ''}"
        + (" (not shown)." if trial.lost else " (shown as far as it came).")
        for trial in read
        if trial.state != FINISHED
    ]


def title(config: ReportRun, read: list[Trial]) -> str:
    """The run's name, else what the trials are about, where it is one thing."""
    tasks = {trial.task for trial in read if trial.config}
    return config.run_name or (
        "Frontier: " + " on ".join(next(iter(tasks))) if len(tasks) == 1 else "Frontier report"
    )


def facts(config: ReportRun, folder: RunFolder, read: list[Trial]) -> dict[str, str]:
    found = {
        "inputs": comparison.written(config.inputs),
        "runs": ", ".join(trial.name for trial in read),
        "x-axis": config.report.kl,
        "seeds": "mean, " + {"range": "lowest to highest", "se": "one standard error"}[config.report.band],
        "tables": f"{REPORT}/{TABLES}/*.csv in {folder.path}",
        "command": shlex.join(["python", "-m", "rlhf_exp", *sys.argv[1:]]),
    }
    if config.tracking.backend == "mlflow":
        found["mlflow"] = how_to_open(tracking_uri(config.tracking, config.output_dir))
    return found


def _decides(folder: RunFolder) -> str:
    """The objective of the first picture: the first of report.objectives that was measured."""
    with (folder.path / REPORT / TABLES / "pareto.csv").open(encoding="utf-8", newline="") as file:
        return next(csv.DictReader(file))["objective"]


def show(config: ReportRun, folder: RunFolder) -> None:
    """The last lines: where things are."""
    metrics = folder.read().get("metrics", {})
    if "best" in metrics:
        name = _decides(folder)
        most = "at most " if metrics.get("best_kl_is_bound") else ""
        say(f"highest {name} {metrics['best']:.4g} at KL {most}{metrics['best_kl']:.4g}")
    say(f"\nrun folder   {folder.path}")
    say(f"report       {folder.path / REPORT / PAGE}")
