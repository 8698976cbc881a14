"""python -m rlhf_exp.store: what is in the store, what made it, what differs, what can go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.store import diff, gc, listing, show

DEFAULT_DIR = "outputs"
PIPED_WIDTH = 200  # columns when the output is no terminal
DEFAULT_DAYS = 30.0


def _parser() -> argparse.ArgumentParser:
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--dir", type=Path, default=argparse.SUPPRESS, help=f"folder of the runs, default: {DEFAULT_DIR}"
    )
    parser = argparse.ArgumentParser(prog="python -m rlhf_exp.store", description=__doc__, parents=[place])
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|show|diff|gc")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[place])

    run_help = "first digits of the key, stage/digits, or the run's folder"
    command("ls", "list the runs")
    command("show", "one run: inputs, config, metrics, parents").add_argument("run", help=run_help)
    two = command("diff", "which config leaves, data, parents and versions differ between two runs")
    two.add_argument("a", help=run_help)
    two.add_argument("b", help=run_help)
    clean = command("gc", "what can go: unfinished runs that no process builds, leftovers of crashes")
    what = clean.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only show it (the default)")
    what.add_argument("--delete", action="store_true", help="delete it")
    clean.add_argument(
        "--unused", action="store_true", help="also finished runs that no other run was made from"
    )
    clean.add_argument(
        "--days", type=float, help=f"with --unused: at least this old, default: {DEFAULT_DAYS:g}"
    )
    return parser


def _ls(console: Console, output_dir: Path) -> None:
    entries = listing.scan(output_dir)
    if entries:
        console.print(listing.table(entries))
        total = listing.human(sum(e.size for e in entries))
        console.print(f"\n{len(entries)} runs, {total}, in {escape(str(output_dir))}")
    else:
        console.print(f"no runs in {escape(str(output_dir))}")


def _gc(console: Console, output_dir: Path, options: argparse.Namespace) -> None:
    if options.days is not None and not options.unused:
        raise InputError("gc --days counts only with --unused (unfinished runs go whatever their age)")
    if options.days is not None and not options.days >= 0:
        raise InputError(f"gc --days must be at least 0, got {options.days}")
    days = (DEFAULT_DAYS if options.days is None else options.days) if options.unused else None
    candidates = gc.plan(output_dir, days)
    if not candidates:
        console.print("nothing can go")
        return
    console.print(gc.render(candidates, output_dir))
    total = sum(candidate.size for candidate in candidates)
    if not options.delete:
        console.print(f"\n{listing.human(total)} can go; nothing is deleted yet: add --delete")
        return
    freed = sum(
        gc.delete(candidate, output_dir, lambda line: console.print(escape(line))) for candidate in candidates
    )
    console.print(f"\n{listing.human(freed)} freed")


def _execute(options: argparse.Namespace) -> None:
    output_dir = getattr(options, "dir", Path(DEFAULT_DIR))
    terminal = sys.stdout.isatty()
    # soft_wrap would break the tables; piped output gets a fixed width, so that a script sees whole rows
    console = Console(width=None if terminal else PIPED_WIDTH, highlight=False)
    if options.command == "ls":
        _ls(console, output_dir)
    elif options.command == "show":
        console.print(show.render(listing.resolve(output_dir, options.run), output_dir))
    elif options.command == "diff":
        a, b = (listing.resolve(output_dir, text) for text in (options.a, options.b))
        console.print(diff.render(a, b))
    else:
        _gc(console, output_dir, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for bad input with a line on stderr each."""
    try:
        _execute(_parser().parse_args(argv))
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
