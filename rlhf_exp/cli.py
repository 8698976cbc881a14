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

from rlhf_exp import __version__, distributed
from rlhf_exp.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Interrupted
from rlhf_exp.strategies import command

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
        with command.together():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv), argv is None)
            sys.stdout.flush()  # here, where a reader that has left can be dealt with
        return code
    except command.Lost as error:  # by now it is said why
        return error.code
    except InputError as error:
        _report(error)
        return EXIT_BAD_INPUT
    except Interrupted as error:
        if distributed.is_main():
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
    for problem in error.problems if distributed.is_main() else ():
        print(f"error: {problem}", file=sys.stderr)


def _dispatch(argv: list[str], is_process: bool) -> int:
    given = argparse.Namespace(given=argv, is_process=is_process)
    args = parser().parse_intermixed_args(argv, given)  # flags may stand between the overrides
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
    from rlhf_exp import compose
    from rlhf_exp.sweeps import plan as sweep

    with compose.session(args.config_dir) as hydra:
        if args.shell_completion:
            hydra.shell_completion(config_name=compose.ROOT, overrides=args.overrides)
            return 0
        plan = distributed.agree(lambda: sweep.plan(args.overrides, args.multirun))
        if args.cfg == "job":
            print(compose.yaml(plan.config, args.package, args.resolve), end="")
            return 0
        if args.cfg:
            with compose.explained():
                hydra.show_cfg(compose.ROOT, plan.first, args.cfg, args.package, args.resolve)
            return 0
        if args.info:
            with compose.explained():
                hydra.show_info(args.info, config_name=compose.ROOT, overrides=plan.first)
            return 0
        if plan.multirun:
            if distributed.world_size() > 1:
                raise InputError(
                    f"a sweep starts its trials itself, and was started {distributed.world_size()} times: start it "
                    "without torchrun; hydra/launcher=slurm gives each trial its ranks"
                )
            from rlhf_exp.sweeps import run

            return run.start(plan, task, args.given, args.config_dir, args.is_process)
        # the task's own errors are collected, what remains is Hydra's
        with sweep.failures() as failures, compose.explained():
            hydra.run(compose.ROOT, task, [*plan.overrides, "hydra.mode=RUN"])
        if failures:
            raise failures[0].error
        return 0


def task(config: Any) -> float | None:
    """One run: what Hydra calls with a composed config, here or on a node."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from rlhf_exp import compose

    node = HydraConfig.get()
    choices = compose.choices_of(node)
    if node.mode == RunMode.MULTIRUN:
        from rlhf_exp.sweeps import trial

        folder = Path(node.runtime.output_dir)
        ended = trial.run(trial.write(folder, node.job.num, node.overrides.task, config, choices))
        if ended.error is not None:
            raise ended.error
        return ended.value
    run = distributed.agree(lambda: compose.to_run(config))
    from rlhf_exp.stages import pipeline

    return pipeline.run(run, choices)
