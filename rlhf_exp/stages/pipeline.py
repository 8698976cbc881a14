"""From a config to results: plan, check, then build what is missing, each stage once, on one loaded base."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp import distributed
from rlhf_exp.errors import InputError, Interrupted
from rlhf_exp.schema import ReportRun, Run
from rlhf_exp.stages import STAGES, gate, memory, plan, preflight, report, rounds, signals, summary
from rlhf_exp.stages.context import ADAPTER, CRITIC, EMA, HEAD, ILQL, MODEL, Context
from rlhf_exp.stages.nodes import Node, Plan
from rlhf_exp.store import atomic, states
from rlhf_exp.store.frozen import CONFIG, VERSIONS, freeze
from rlhf_exp.store.locks import build_lock
from rlhf_exp.store.runs import FAILED, KILLED, PREFIX, RunFolder, find, run_folder
from rlhf_exp.strategies import command, require
from rlhf_exp.sweeps import current, figures, pruning
from rlhf_exp.tracking import Tracker, open_tracker, require_store, resend, tracked

if TYPE_CHECKING:
    from rlhf_exp.model.base import Base


def run(config: Run | ReportRun, choices: dict[str, str]) -> float | None:
    """Build what `config` asks for and return its objective; None for a dry run.

    Raises InputError, with every problem, before anything is loaded.
    """
    with command.together():
        return _run(config, choices)


def _run(config: Run | ReportRun, choices: dict[str, str]) -> float | None:
    if isinstance(config, ReportRun):  # it reads what others built
        return report.run(config) if distributed.is_main() else None
    started = time.monotonic()
    require.same_config(config)
    todo = distributed.agree(lambda: checked(plan.make(config, choices)))
    require.same_plan(todo)
    for line in todo.lines():
        say(line)
    if config.dry_run:
        for line in memory.estimate(todo):
            say(line)
        return None
    bases = Bases(todo)
    if first := gate.undecided(todo):
        make(replace(todo, target=first[-1], nodes=first), bases)
        built = {node.key: node.found for node in first}
        todo = distributed.agree(lambda: checked(plan.make(config, choices, built)))
        for line in gate.lines(todo):
            say(line)
    current.note(todo)
    if current.parent_run() and todo.target.found and distributed.is_main():
        link(todo)
    make(todo, bases)
    current.note(todo)
    say(f"done in {time.monotonic() - started:.0f} s")
    summary.show(todo)
    return objective(todo.target.found)


def checked(todo: Plan) -> Plan:
    """The plan, if all that it needs is there."""
    # libraries import DeepSpeed where it is installed, and it warns that it looked for a device
    if todo.base.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    preflight.check(todo)
    return todo


def make(todo: Plan, bases: Bases) -> None:
    """Build what is missing, and finish the uploads of what was there."""
    config, cached = todo.config, cached_tags(todo)
    if not (todo.missing or unsettled(todo) or note_of(todo).exists()):
        return
    require_store(config.tracking, config.output_dir)
    with signals.listening(), experiment(todo) as tracker:
        for node in unsettled(todo):
            settle(node, todo)
        for node in todo.missing:
            if node.stage in gate.TRAINED:
                gate.show(todo)
                for line in gate.notes(todo):
                    say(line)
                gate.check(todo)
            build(node, todo, tracker, bases, cached)


def link(todo: Plan) -> None:
    """In a sweep, a run in MLflow for a trial whose result is there already: its figures, and which run made them."""
    config, target = todo.config, todo.target
    tags = {"stage": target.stage, **current.tags(target, todo), **cached_tags(todo)}
    name = f"{current.name(target, todo)} cached"
    with tracked(open_tracker(config.tracking, config.output_dir, name, tags, current.parent_run())) as own:
        own.params(asdict(target.config))
        upload(target.found, own, files=False)


def say(line: str) -> None:
    print(line, flush=True)


def objective(folder: RunFolder) -> float | None:
    return figures.objective(folder.read().get("metrics", {}))[1]


class Bases:
    """The base model, loaded when a stage first needs it and shared by all that stand on the same one."""

    def __init__(self, todo: Plan):
        self.todo = todo
        self.loaded: Base | None = None
        if todo.config.threads:
            import torch

            torch.set_num_threads(todo.config.threads)

    def of(self, node: Node) -> Base:
        """The base of a stage; the one before leaves the memory first."""
        from rlhf_exp.model.base import load_base

        model, folder = node.config.model, node.base.folder
        sft = node.parents.get("sft")
        if sft is not None and sft.makes_base:
            model, folder = replace(model, from_scratch=False), sft.folder / MODEL
        elif node.makes_base:
            model = replace(model, dtype=node.base.dtype)
        if self.loaded is None or self.loaded.path != folder or node.makes_base:
            self.loaded = None
            self.loaded = load_base(model, self.todo.base.device, folder, node.config.seed)
            if self.todo.config.strategy.name.startswith("zero3"):
                from rlhf_exp.strategies import parameters

                parameters.shard(self.loaded, self.todo.config.strategy)
        return self.loaded

    def forget(self) -> None:
        """After a stage has changed the weights in memory: what is loaded is no longer what the files say."""
        self.loaded = None


@contextmanager
def experiment(todo: Plan) -> Iterator[Tracker | None]:
    """The MLflow run whose children the stages are; None when only one stage runs, which then stands alone.

    A note beside the run folders keeps its id until it is done: the same command goes on with it after a kill. In a
    sweep all stages are children of the sweep's run.
    """
    if current.parent_run():
        yield None
        return
    config, note = todo.config, note_of(todo)
    earlier = note.read_text() if note.is_file() and config.resume != "never" else None
    if len(todo.missing) <= 1 and config.stage != "pipeline" and not earlier:
        yield None
        return
    name = config.run_name or f"{config.stage} {todo.target.key[:6]}"
    tags = {"stage": config.stage, "key": todo.target.key}
    if config.resume != "never":
        tags["folder"] = str(Path(config.output_dir).absolute())
    tracker = open_tracker(config.tracking, config.output_dir, name, tags, run_id=earlier)
    if tracker.run_id:
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(note, tracker.run_id.encode())
    with tracked(tracker):
        tracker.tags(cached_tags(todo))
        yield tracker
    if tracker.run_id:
        note.unlink(missing_ok=True)


def note_of(todo: Plan) -> Path:
    """Where the id of the experiment's MLflow run is until it has ended."""
    name = f"{todo.config.stage}-{todo.target.key[:PREFIX]}"
    return Path(todo.config.output_dir) / ".experiments" / name


def unsettled(todo: Plan) -> list[Node]:
    """Finished stages whose process was killed before their uploads were done."""
    if not distributed.is_main():
        return []
    return [node for node in todo.nodes if node.found and node.found.read().get("tracked") is False]


def settle(node: Node, todo: Plan) -> None:
    """Upload what is missing and end the MLflow run."""
    folder, config = node.found, todo.config
    with build_lock(folder.path, say):
        record = folder.read()
        if record.get("tracked") is not False:  # another process did it meanwhile
            return
        states.remove(folder.path)
        if run_id := record.get("mlflow_run_id"):
            name = f"{node.name} {node.key[:6]}"
            with tracked(open_tracker(config.tracking, config.output_dir, name, run_id=run_id)) as own:
                resend(folder.path, own)
                upload(folder, own)
            if own.run_id is None:  # tracking=none now: another time
                return
        folder.update(tracked=True)


def upload(folder: RunFolder, tracker: Tracker, files: bool = True) -> None:
    """The results of a finished stage; files: its adapters and the like too."""
    metrics = folder.read()["metrics"].items()
    tracker.metrics({f"final/{name}": value for name, value in metrics if value is not None}, step=0)
    for part in (ADAPTER, EMA, HEAD, CRITIC, ILQL, gate.PROBE, gate.GATE):
        if files and (folder.path / part).is_dir():
            tracker.artifact(folder.path / part, part)


def cached_tags(todo: Plan) -> dict[str, str]:
    """Links to the MLflow runs of stages that were not trained again."""
    found = {}
    for node in todo.nodes:
        if node.found:
            found[f"cached.{node.name}"] = node.key
            if run_id := node.found.read().get("mlflow_run_id"):
                found[f"cached.{node.name}.run_id"] = run_id
    return found


def build(
    node: Node, todo: Plan, tracker: Tracker | None, bases: Bases, cached: Mapping[str, object]
) -> None:
    """Train one stage, or wait for another process that does, and note where the result is.

    cached: tags of a run that stands alone, for what was there before.
    """
    config = node.config = rounds.with_labels(node)
    fresh = config.resume == "never" and todo.config.stage in (node.name, "pipeline")
    folder = distributed.from_main(
        lambda: run_folder(config.output_dir, node.stage, node.key, "never" if fresh else "auto")
    )
    with build_lock(folder.path, say):
        node.found = distributed.from_main(
            lambda: None if fresh else find(config.output_dir, node.stage, node.key)
        )
        if node.found:
            say(f"{node.name} {node.key[:6]}: built by another process meanwhile, reused")
            return
        earlier = folder.read().get("mlflow_run_id")  # of an attempt that was interrupted
        name = f"{node.name} {node.key[:6]}"
        tags = {"stage": node.stage, "key": node.key, "folder": str(folder.path.absolute())}
        if tracker is None:
            name = config.run_name or current.name(node, todo) or name
            tags |= {**cached, **current.tags(node, todo)}
            parent = current.parent_run()
            own = open_tracker(config.tracking, config.output_dir, name, tags, parent, earlier)
        else:
            own = tracker.child(name, tags, earlier)
        with tracked(own), recorded(folder, node, own):
            parents = {
                name: parent.folder
                for name, parent in node.parents.items()
                if parent.folder and not parent.makes_base  # that one is the base
            }
            every, typed = config.checkpoint_every, partial(memory.typed, node=node, plan=todo)
            context = Context(bases.of(node), folder, own, parents, every, typed)
            gate.keep(node, folder)
            early = config.early_stop if current.is_own(node, todo) else None
            with pruning.watched(early, config.rft.rounds if node.stage == "rft" else 1):
                metrics = import_module(STAGES[node.stage].module).run(config, context)
            if node.makes_base:
                bases.forget()
            folder.finish(metrics)  # before the uploads: whatever becomes of them, the result is there
            upload(folder, own)
        folder.update(tracked=True)
        node.found = folder
    distributed.barrier()  # from here on the others read what rank 0 wrote


@contextmanager
def recorded(folder: RunFolder, node: Node, tracker: Tracker) -> Iterator[None]:
    """run.json from start to end, the frozen config, and how the run ended."""
    inputs: dict[str, Any] = {**node.inputs, "parents": {}}
    for name, parent in node.parents.items():
        path = None if parent.folder is None else os.path.relpath(parent.folder, folder.path)
        inputs["parents"][name] = {
            "stage": parent.stage,
            "key": node.inputs["parents"][name]["key"],
            "path": path,
        }
    folder.start(inputs, mlflow_run_id=tracker.run_id, tracked=False)
    try:
        freeze(folder, node.config, sys.argv[1:])
        tracker.params(asdict(node.config))
        for name in (CONFIG, VERSIONS):
            tracker.artifact(folder.path / name)
        yield
    except (KeyboardInterrupt, SystemExit, Interrupted) as error:
        folder.fail(KILLED, str(error) if isinstance(error, Interrupted) else "stopped by a signal")
        raise
    except InputError as error:
        folder.fail(FAILED, str(error))
        raise
    except BaseException:
        folder.fail(FAILED, traceback.format_exc())
        raise
