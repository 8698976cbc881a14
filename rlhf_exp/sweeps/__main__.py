"""`python -m rlhf_exp.sweeps`: go on with a sweep, look at it, make a page of it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.sweeps import folder


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m rlhf_exp.sweeps", description=__doc__)
    verbs = flags.add_subparsers(dest="verb", required=True, metavar="VERB")
    resume = verbs.add_parser(
        "resume", help="run what is not finished, on the sweep's frozen code and configs"
    )
    resume.add_argument(
        "--stopped", action="store_true", help="trials that were stopped early too, now to their end"
    )
    resume.add_argument(
        "--new-code", action="store_true", help="freeze the code as it is now first; configs of trials stay"
    )
    show = verbs.add_parser("show", help="the table of the trials as they are now")
    collect = verbs.add_parser(
        "collect", help="table, report and the end in MLflow, of trials that ran elsewhere"
    )
    page = verbs.add_parser("page", help="put the table and the picture of a sweep into its page")
    for verb in (resume, show, collect, page):
        verb.add_argument("folder", type=Path, help="the sweep's folder, multirun/results/...")
    page.add_argument("page", type=Path, help="multirun/NAME.md; the part between its marks is written anew")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    path = given.folder.absolute()
    try:
        folder.read(path)
        if given.verb == "show":
            from rlhf_exp.sweeps import collect, table

            collect.show(table.rows(path))
            return 0
        if given.verb == "page":
            from rlhf_exp.sweeps import page

            page.write(path, given.page)
            return 0
        where = given.folder.absolute()
        os.chdir(folder.started_in(path))
        if given.verb == "collect":
            from rlhf_exp.sweeps import collect

            return collect.again(where)
        from rlhf_exp.sweeps import resume

        return resume.go_on(where, stopped=given.stopped, new_code=given.new_code)
    except InputError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
