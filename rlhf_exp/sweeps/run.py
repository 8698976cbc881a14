"""A sweep from its first trial to its table.

folder made, code frozen -> every trial composed and checked -> MLflow's run of the sweep -> Hydra's sweeper, which
hands trials to a launcher -> collected: table, report, the command that continues what is left
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext

from rlhf_exp import compose
from rlhf_exp.errors import EXIT_INTERRUPTED, InputError, Interrupted
from rlhf_exp.paths import PACKAGE, conf_dir
from rlhf_exp.stages import signals
from rlhf_exp.store import atomic
from rlhf_exp.store.preflight import require_writable
from rlhf_exp.sweeps import collect, folder, grid, ledger, passwords, resume, trial
from rlhf_exp.sweeps import plan as plans

EXIT_CTRL_C = 130
PARTS = ("sweeper", "launcher")
LOCK = ".search.lock"
MULTIRUN = "multirun.yaml"  # Hydra's sweepers write their config there


def start(
    plan: plans.Plan,
    task: Callable[[Any], Any],
    argv: Sequence[str],
    config_dir: str | None = None,
    is_process: bool = False,
) -> int:
    """Run the sweep that `plan` says, or what is left of it, and return the exit code.

    argv: the command as it was given. is_process: this process does nothing else, and may go on as one that runs on
    the sweep's frozen code; else the configs alone are frozen. Raises InputError before anything starts.
    """
    _refuse(plan, task)
    plan, argv = passwords.kept_out(plan, argv)
    trials = _trials(plan)
    if plan.config.get("dry_run"):
        from rlhf_exp.sweeps import estimate

        return estimate.show(plan, trials)
    path = Path(str(plan.config.hydra.sweep.dir)).absolute()
    if plan.config.hydra.launcher.get("dry_run"):
        _show(plan, task, path)
        return 0
    if not folder.is_sweep(path):
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{resume.SWEEP_DIR}={path} is no sweep, and not empty: choose another folder")
        require_writable(path, resume.SWEEP_DIR)
        chosen = plan.config.hydra.runtime.choices
        names = {part: str(chosen.get(f"hydra/{part}")) for part in PARTS}
        words = resume.without_place(argv)
        folder.create(path, words, conf=conf_dir(), config_dir=config_dir, **names)
    if is_process and PACKAGE.parent != folder.code(path):
        resume.become(path, argv)
    alone = nullcontext() if grid.is_grid(plan.config) else _alone(path)
    with alone, compose.session(folder.config_dir(path), folder.conf(path)) as hydra:
        _freeze(path, trials)
        run = compose.to_run(plan.config, across=False)
        return _sweep(path, plan, run, lambda lines: hydra.multirun(compose.ROOT, task, lines))


def _refuse(plan: plans.Plan, task: Callable[[Any], Any]) -> None:
    """Have sweeper and launcher look at their settings; what cannot be is an InputError of theirs."""
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    with compose.explained():
        sweeper = Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=task, config=plan.config
        )
        if check := getattr(sweeper, "check", None):
            check(trial.without_hydra(plan.overrides))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A search is one process's: a second one would launch the trials that the first is waiting for.

    The kernel gives the lock back however the process ends. Raises InputError where another process has it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process runs this search: {path}; wait for it, or choose another {resume.SWEEP_DIR}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _show(plan: plans.Plan, task: Callable[[Any], Any], path: Path) -> None:
    """Have the launcher show what it would submit. Nothing stays behind but what was there before."""
    above = next(parent for parent in (path, *path.parents) if parent.is_dir())
    written = path / MULTIRUN
    before = written.read_bytes() if written.is_file() else None
    try:
        with compose.session() as hydra, compose.explained():
            hydra.multirun(compose.ROOT, task, [*plan.overrides, resume.place(path), "hydra.mode=MULTIRUN"])
    finally:
        _take_back(path, above, written, before)


def _take_back(path: Path, above: Path, written: Path, before: bytes | None) -> None:
    """Remove the config that Hydra's sweeper has left, and the folders that were made for it."""
    if above == path:
        if before is None:
            written.unlink(missing_ok=True)
        else:
            atomic.write_bytes(written, before)
        return
    shutil.rmtree(path, ignore_errors=True)
    for parent in path.parents:
        if parent == above or not parent.is_dir() or any(parent.iterdir()):
            break  # somebody else's sweep may have begun there
        parent.rmdir()


def _trials(plan: plans.Plan) -> list[grid.Composed]:
    """Every trial of a grid, composed; [] where the sweeper chooses them as it goes."""
    if not grid.is_grid(plan.config):
        return []
    found = list(grid.composed(grid.listed(plan.overrides, plan.config), compose.tree()))
    broken = [f"trial {one.number} ({' '.join(one.overrides)}): {p}" for one in found for p in one.broken]
    if broken:
        raise InputError(broken)
    return found


def _freeze(path: Path, trials: Sequence[grid.Composed]) -> None:
    """Write the trials into the sweep's folder, and say which cannot run."""
    for one in trials:
        choices = compose.choices_of(one.config.hydra)
        trial.write(path / str(one.number), one.number, one.overrides, one.config, choices)
        for problem in one.problems:
            print(f"trial {one.number} cannot run, the others will: {problem}", flush=True)


def _sweep(path: Path, plan: plans.Plan, run: Any, multirun: Callable[[list[str]], Any]) -> int:
    """Hand the trials out, hear of all of them, and collect."""
    parent = collect.begin(path, run, plan.swept)
    print(f"sweep {path}", flush=True)
    lines = [*resume.without_place(plan.overrides), resume.place(path), "hydra.mode=MULTIRUN"]
    stopped: BaseException | None = None
    try:
        known = plans.checked() if grid.is_grid(plan.config) else nullcontext()
        with plans.failures() as failures, known, compose.explained(), signals.listening():
            multirun(lines)
    except (KeyboardInterrupt, Interrupted) as error:
        stopped = error
    except BaseException:
        parent.finish("FAILED")
        raise
    _enter(path, failures)
    code = collect.end(path, parent, stopped is not None)
    if isinstance(stopped, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_CTRL_C if stopped is not None else code


def _enter(path: Path, failures: Sequence[plans.Failure]) -> None:
    """Jobs that raised before their trial could say so itself."""
    known = ledger.states(path)
    for failure in failures:
        number = failure.number
        if number is None or (number in known and known[number].status in (ledger.FAILED, *ledger.SETTLED)):
            continue
        if number not in known:
            ledger.append(path, ledger.TRIAL, number=number, overrides=trial.without_hydra(failure.overrides))
        bad_input = isinstance(failure.error, InputError)
        said = f"{type(failure.error).__name__}: {failure.error}".partition("\n")[0]
        reason = "; ".join(failure.error.problems) if isinstance(failure.error, InputError) else said
        ledger.append(
            path, ledger.ENDED, number=number, status=ledger.FAILED, reason=reason, bad_input=bad_input
        )
