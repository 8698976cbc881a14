"""The command line: read it, check it, hand a dataclass to the stages, turn errors into lines and exit codes.

Nothing heavy is imported before the config is sound, and Hydra only where something is composed. Exit codes:
0 done, 2 bad input (`error: ...`, a line each), 75 saved and stopped by a signal, 130 Ctrl-C, 1 any other.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf_exp import __version__
from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted

EXIT_FAILED = 1
EXIT_CTRL_C = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        hint = "; keys are written without dashes: key=value" if "unrecognized" in message else ""
        raise InputError(f"{message}{hint}")


def parser() -> argparse.ArgumentParser:
    """Our flags: those of Hydra that make sense here, under their names."""
    flags = _Parser(prog="rlhf_exp", add_help=False, allow_abbrev=False)
    flags.add_argument("overrides", nargs="*", metavar="key=value")
    flags.add_argument(
        "-h", "--help", action="store_true", help="this page; with stage=..., that stage's keys"
    )
    flags.add_argument("--version", action="store_true", help="the version of rlhf_exp")
    flags.add_argument(
        "-c", "--cfg", choices=("job", "hydra", "all"), help="print the composed config and stop"
    )
    flags.add_argument("-p", "--package", help="with --cfg: only this part, such as ppo")
    flags.add_argument("--resolve", action="store_true", help="with --cfg: with interpolations resolved")
    flags.add_argument(
        "-m", "--multirun", action="store_true", help="a trial for each value: ppo.kl_coef=.1,.2"
    )
    flags.add_argument("-cd", "--config-dir", help="a folder with more options, laid out as conf/")
    flags.add_argument(
        "-i", "--info", nargs="?", const="all", help="what Hydra composes from, e.g. defaults-tree"
    )
    flags.add_argument("-sc", "--shell-completion", action="store_true", help="install=bash, for the Tab key")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a reader that has left can be dealt with
        return code
    except InputError as error:
        _report(error)
        return EXIT_BAD_INPUT
    except Interrupted as error:
        print(str(error) or "stopped by a signal; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return EXIT_CTRL_C
    except BrokenPipeError:
        # the reader of a pipe (`| head`) has left; what the interpreter would still flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED


def _report(error: InputError) -> None:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.version:
        print(f"rlhf_exp {__version__}")
        return 0
    if args.help or not argv:
        from rlhf_exp.helppage import page

        print(page(args.overrides), end="")
        return 0
    return _hydra(args)


def _hydra(args: argparse.Namespace) -> int:
    """Everything that composes."""
    from rlhf_exp import compose, sweep

    with compose.session(args.config_dir) as hydra:
        if args.shell_completion:
            hydra.shell_completion(config_name=compose.ROOT, overrides=args.overrides)
            return 0
        plan = sweep.plan(args.overrides, args.multirun)
        if args.cfg == "job":
            print(compose.yaml(plan.config, args.package, args.resolve), end="")
            return 0
        if args.cfg:
            hydra.show_cfg(compose.ROOT, plan.overrides, args.cfg, args.package, args.resolve)
            return 0
        if args.info:
            hydra.show_info(args.info, config_name=compose.ROOT, overrides=plan.overrides)
            return 0
        mode = "MULTIRUN" if plan.multirun else "RUN"
        start = hydra.multirun if plan.multirun else hydra.run
        # the task's own errors are collected, what remains is Hydra's
        with sweep.failures() as failures, compose.explained():
            start(compose.ROOT, task, [*plan.overrides, f"hydra.mode={mode}"])
        return _summary(failures) if plan.multirun else _single(failures)


def _single(failures: Sequence[Any]) -> int:
    if failures:
        raise failures[0].error
    return 0


def _summary(failures: Sequence[Any]) -> int:
    """A line for each failed trial of a sweep."""
    for failure in failures:
        prefix = f"trial {failure.number} ({' '.join(failure.overrides)}): "
        if isinstance(failure.error, InputError):
            said = "; ".join(failure.error.problems)
        else:
            said = f"{type(failure.error).__name__}: {failure.error}".partition("\n")[0]
        print(f"error: {prefix}{said}", file=sys.stderr)
    if not failures:
        return 0
    bad_input = all(isinstance(failure.error, InputError) for failure in failures)
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


def task(config: Any) -> float | None:
    """One run: what Hydra calls with a composed config, here or on a node."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from rlhf_exp import compose

    node = HydraConfig.get()
    trial = node.mode == RunMode.MULTIRUN
    try:
        run, choices = compose.to_run(config), compose.choices_of(node)
        if trial:
            print(f"trial {node.job.num}: {' '.join(node.overrides.task)}", flush=True)
        from rlhf_exp.stages import pipeline
        from rlhf_exp.stages.trial import inside

        with inside(Path(node.runtime.output_dir) if trial else None):
            return pipeline.run(run, choices)
    except InputError:
        raise
    except Exception:
        if trial:
            traceback.print_exc()  # now; the sweep may go on for hours
        raise
