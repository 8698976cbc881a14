"""Builds one upstream stage of a trial, as a job of its own.

The trial is planned again where the job runs, and of the plan only what leads to that stage is built; the trial then
finds it in the store. So a stage is told by its role, and can be no other than the one that the trial will want.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp import distributed
from rlhf_exp.errors import InputError, Interrupted
from rlhf_exp.jobs import graph
from rlhf_exp.jobs.graph import Upstream
from rlhf_exp.sweeps import current, folder, ledger, trial

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Node

FOLDER = "upstream-{name}"  # in the sweep's, for what a stage notes beside its run


def run(sweep: Path, name: str) -> None:
    """Build the stage, and enter in the ledger that it began and how it ended; what goes wrong is then raised."""

    def say(event: str, **fields: object) -> None:
        if distributed.is_main():
            ledger.append(sweep, event, upstream=name, **fields)

    known = graph.read(sweep)
    if known is None or name not in known[0].upstream:
        raise InputError(f"{sweep / graph.FILE} has no upstream job {name}")
    say(ledger.STARTED, host=socket.gethostname(), pid=os.getpid(), job=trial.job())
    began, status, reason = time.monotonic(), ledger.FAILED, ""
    try:
        _build(sweep, name, known[0].upstream[name])
        status = ledger.DONE
    except (KeyboardInterrupt, SystemExit, Interrupted) as error:
        status, reason = ledger.INTERRUPTED, str(error) or type(error).__name__
        raise
    except InputError as error:
        reason = "; ".join(error.problems)
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise
    finally:
        say(ledger.ENDED, status=status, reason=reason, seconds=round(time.monotonic() - began, 3))


def _build(sweep: Path, name: str, wanted: Upstream) -> None:
    from rlhf_exp import compose

    content = trial.read(sweep / str(wanted.trial))
    if Path(content["cwd"]).is_dir():
        os.chdir(content["cwd"])
    frozen = folder.conf(sweep)
    parent = folder.read(sweep).get("mlflow_run_id") if folder.is_sweep(sweep) else None
    place = current.Trial(sweep / FOLDER.format(name=name), wanted.trial, [], parent)
    with (
        compose.session(folder.config_dir(sweep), frozen if frozen.is_dir() else None),
        current.inside(place),
    ):
        from rlhf_exp.stages import pipeline, plan, preflight

        todo = plan.make(trial.config_of(content), content["choices"])
        found = [node for node in todo.nodes if node.name == wanted.role]
        if not found:
            raise InputError(
                f"trial {wanted.trial} does not stand on {wanted.role} here: has the code changed?"
            )
        part = replace(todo, nodes=list(lineage(found[-1])))
        preflight.check(part)
        pipeline.make(part, pipeline.Bases(todo))


def lineage(node: Node) -> Iterator[Node]:
    """A stage after all that it stands on."""
    seen: set[str] = set()

    def walk(one: Node) -> Iterator[Node]:
        seen.add(one.name)
        for parent in one.parents.values():
            if parent.name not in seen:
                yield from walk(parent)
        yield one

    yield from walk(node)
