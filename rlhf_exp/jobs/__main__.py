"""`python -m rlhf_exp.jobs`: the jobs of a sweep that was given to SLURM, from any shell, at any time."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError
from rlhf_exp.jobs import graph as graphs
from rlhf_exp.jobs import script, submit, table, units, watch
from rlhf_exp.jobs.states import NoAnswer
from rlhf_exp.jobs.units import Unit
from rlhf_exp.jobs.watch import Row
from rlhf_exp.sweeps import folder

RESULTS = Path("multirun/results")
LINES = 20
LOOK_S = 3.0  # seconds between two looks at a job whose log is followed


def parser() -> argparse.ArgumentParser:
    """SWEEP is a sweep's folder; without it, the newest in multirun/results."""
    root = argparse.ArgumentParser(
        prog="python -m rlhf_exp.jobs",
        description="The jobs of a sweep that was given to SLURM (hydra/launcher=slurm).",
    )
    commands = root.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.add_argument(
            "sweep", nargs="?", help="folder of the sweep; default: the newest in multirun/results"
        )
        return found

    status = add("status", "How each job stands: waiting, running, done, failed and why.")
    status.add_argument("-w", "--watch", action="store_true", help="keep looking until all have ended")
    status.add_argument("--every", type=float, default=3.0, help="seconds between two looks (3)")
    logs = add("logs", "What a trial or an upstream job has written; without a name: of all that failed.")
    logs.add_argument("unit", nargs="?", help="number of a trial, or name of an upstream job")
    logs.add_argument("-n", "--lines", type=int, default=LINES, help=f"the last so many ({LINES}); 0: all")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as more comes, until it has ended")
    cancel = add("cancel", "End jobs, waiting or running: these, or all of the sweep.")
    cancel.add_argument("units", nargs="*", help="numbers of trials, names of upstream jobs")
    resume = add("resume", "Submit again what has neither ended well nor waits or runs.")
    resume.add_argument("--dry-run", action="store_true", help="print the sbatch scripts and stop")
    add("collect", "When all have ended: table, report and the end in MLflow; else how each stands.")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0; 1 of resume if a trial cannot be submitted; 2 bad input.

    Of collect and status --watch 1 if a trial failed, 75 if some wait or run.
    """
    args = parser().parse_args(argv)
    try:
        if args.command == "status" and not args.every > 0:
            raise InputError(f"--every must be above 0, got {args.every:g}")
        _without_sweep(args)
        sweep = _sweep(args.sweep)
        return {"status": _status, "logs": _logs, "cancel": _cancel, "resume": _resume, "collect": _collect}[
            args.command
        ](sweep, args)
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except NoAnswer as error:
        print(f"error: SLURM does not answer: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130


def _without_sweep(args: argparse.Namespace) -> None:
    """`logs 3`, `cancel 3 4`: what stands in the sweep's place is a job, and the sweep the newest."""
    given = args.sweep
    if given is None or os.sep in given or folder.is_sweep(Path(given)):
        return
    if args.command == "logs" and args.unit is None:
        args.sweep, args.unit = None, given
    elif args.command == "cancel":
        args.sweep, args.units = None, [given, *args.units]


def _sweep(given: str | None) -> Path:
    if given is not None:
        if not folder.is_sweep(Path(given)):
            folder.read(Path(given))  # says what is wrong
        return Path(given)
    found = [path for path in RESULTS.glob("*") if folder.is_sweep(path)] if RESULTS.is_dir() else []
    if not found:
        raise InputError(f"no sweep in {RESULTS.absolute()}: give the folder of one")
    return max(found, key=lambda path: path.name)


def _look(sweep: Path) -> tuple[list[Row], str]:
    """The rows, and a word on SLURM if it does not answer."""
    try:
        return watch.look(sweep), ""
    except NoAnswer as error:
        return watch.offline(sweep), f"; SLURM does not answer ({error}), this is what the ledger says"


def _status(sweep: Path, args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    rows, note = _look(sweep)
    if not args.watch:
        console.print(table.table(sweep, rows, note))
        return 0
    from rich.live import Live

    with Live(table.table(sweep, rows, note), console=console, auto_refresh=False) as live:
        while any(row.unit.open for row in rows):
            time.sleep(args.every)
            rows, note = _look(sweep)
            live.update(table.table(sweep, rows, note), refresh=True)
    return _code(rows)


def _code(rows: Sequence[Row]) -> int:
    trials = [row.unit for row in rows if row.unit.number is not None]
    if any(unit.open for unit in trials):
        return EXIT_INTERRUPTED
    return 0 if all(unit.done for unit in trials) else 1


def _logs(sweep: Path, args: argparse.Namespace) -> int:
    known = units.read(sweep)
    if args.unit is None:
        chosen = [unit for unit in known.values() if unit.ended and not unit.done]
        if not chosen:
            print("nothing has failed; name a trial to see what it has written")
    else:
        chosen = [_unit(sweep, known, args.unit)]
    for unit in chosen:
        path = script.log(sweep, unit.job) if unit.job else None
        if args.follow and path is not None:
            _await(sweep, unit.name, path)
        if path is None or not path.is_file():
            print(
                f"== {unit.name}: no log ({'not submitted' if path is None else f'{path} is not there yet'})"
            )
            if unit.reason:
                print(unit.reason)
            continue
        print(f"== {unit.name}: {path}", flush=True)
        with path.open(errors="replace") as stream:
            text = stream.read().splitlines(keepends=True)
            print(*text[-args.lines :], sep="", end="", flush=True)
            if args.follow:
                _follow(sweep, unit.name, stream)
    return 0


def _await(sweep: Path, name: str, path: Path) -> None:
    """Wait for the log of a job that has not begun."""
    said = ""
    while not path.is_file() and not (row := _row(sweep, name)).unit.ended:
        if (words := watch.line(row)) != said:
            print(said := words, flush=True)
        time.sleep(LOOK_S)


def _follow(sweep: Path, name: str, stream: TextIO) -> None:
    """Print what is added to a log until the job has ended, or Ctrl-C."""
    ended, looked = False, 0.0
    while True:
        if more := stream.read():
            print(more, end="", flush=True)
        elif ended:
            return
        else:
            time.sleep(0.5)
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                ended = _row(sweep, name).unit.ended


def _row(sweep: Path, name: str) -> Row:
    return next(row for row in _look(sweep)[0] if row.unit.name == name)


def _unit(sweep: Path, known: dict[str, Unit], name: str) -> Unit:
    if name in known:
        return known[name]
    said = ", ".join(known) or "none"
    raise InputError(f"{sweep} has no job {name}; there are: {said}")


def _cancel(sweep: Path, args: argparse.Namespace) -> int:
    known = units.read(sweep)
    chosen = [_unit(sweep, known, name) for name in args.units] or list(known.values())
    jobs = [unit.job for unit in chosen if unit.open]
    if not jobs:
        print("nothing waits or runs")
        return 0
    if said := submit.cancel(jobs):
        print(f"error: {said}", file=sys.stderr)
        return 1
    print(f"cancelled: {', '.join(unit.name for unit in chosen if unit.open)}")
    return 0


def _resume(sweep: Path, args: argparse.Namespace) -> int:
    found = graphs.read(sweep)
    if found is None:
        raise InputError(f"{sweep} was not given to SLURM: repeat its command with hydra.sweep.dir={sweep}")
    graph, settings = found
    folder.started_in(sweep)  # where its jobs are to run
    trials = [row.unit for row in watch.look(sweep) if row.unit.number is not None]
    todo = [unit for unit in trials if not unit.done and not unit.open]
    again = [unit.number for unit in todo if unit.number in graph.stages]
    # they failed before there was a job for them
    lost = [unit for unit in todo if unit.number not in graph.stages]
    if again and args.dry_run:
        print("\n\n".join(submit.texts(sweep, graph, settings, again)))
    elif again:
        jobs = submit.submit(sweep, graph, settings, again)
        print(f"trials {', '.join(map(str, sorted(again)))}: submitted as {', '.join(jobs)}")
    elif not lost:
        print("nothing to do: every trial has ended well, waits or runs")
    for unit in lost:
        said = f"trial {unit.number} ({unit.status}{f': {unit.reason}' if unit.reason else ''})"
        way = f"repeat the sweep's command with hydra.sweep.dir={sweep}"
        print(
            f"error: {said} was never given to SLURM and cannot be submitted from here: {way}",
            file=sys.stderr,
        )
    return 1 if lost else 0


def _collect(sweep: Path, args: argparse.Namespace) -> int:
    from rlhf_exp.sweeps import collect

    rows = watch.look(sweep)
    if any(row.unit.open for row in rows):
        from rich.console import Console

        Console().print(table.table(sweep, rows))
        return EXIT_INTERRUPTED
    path = sweep.absolute()
    os.chdir(folder.started_in(path))
    return collect.again(path)


if __name__ == "__main__":
    sys.exit(main())
