"""The process that the worker starts on each task: a trial or an upstream stage, together with the other ranks.

`python -m rlhf_exp.jobs.child SWEEP 3`, or the name of an upstream job for 3.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rlhf_exp import distributed
from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted
from rlhf_exp.jobs import upstream
from rlhf_exp.strategies import command
from rlhf_exp.sweeps import trial

EXIT_FAILED, EXIT_CTRL_C = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as of `python -m rlhf_exp`; 0 also for a trial that was stopped early."""
    sweep, unit = sys.argv[1:] if argv is None else argv
    try:
        with command.together():
            return run(Path(sweep).absolute(), unit)
    except command.Lost as error:  # by now it is said why
        return error.code
    except InputError as error:
        for problem in error.problems if distributed.is_main() else ():
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Interrupted as error:
        print(error, file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_CTRL_C
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def run(sweep: Path, unit: str) -> int:
    """Errors are raised, so that the other ranks hear of them."""
    if not unit.isdecimal():
        upstream.run(sweep, unit)
        return 0
    place = sweep / unit
    cwd = trial.read(place)["cwd"]
    if Path(cwd).is_dir():
        os.chdir(cwd)  # relative paths of the config are from where the sweep was started
    found = trial.run(place)
    if found.error is not None:
        raise found.error
    return trial.EXITS[found.status]


if __name__ == "__main__":
    distributed.leave(main())
