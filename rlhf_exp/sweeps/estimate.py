"""dry_run=true on a sweep: its trials, what is there already, what will be trained once, and for how long.

Seconds come from finished runs in the same output_dir: of the same stage and model, the one whose settings in COST
agree most. A training's cost is its steps times the median step time there, plus what the run took beside its steps;
a stage without steps costs what it cost there. Where nothing was measured, the answer is "unknown".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp import compose
from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.memory.table import gigabytes
from rlhf_exp.progress import duration
from rlhf_exp.sweeps import grid, ledger, table
from rlhf_exp.sweeps.plan import Plan

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Node
    from rlhf_exp.store.listing import Entry

# what decides how long a step takes, beside stage and model
COST = (
    *("ppo.batch_size", "ppo.samples_per_prompt", "ppo.epochs", "ppo.critic", "generation.max_new_tokens"),
    *("train.batch_size", "dataset.name", "dataset.max_prompt_tokens", "dataset.max_response_tokens"),
    *("lora.r", "reward_source.kind", "model.dtype", "device", "strategy.name"),
)
TIMES = ("time/rollout", "time/score", "time/update")
UNKNOWN = "unknown"


class Measured(NamedTuple):
    """What a finished run took: seconds a step (None: it has no steps) and beside its steps; differs: of COST."""

    name: str
    step: float | None
    rest: float
    differs: tuple[str, ...]


@dataclass
class Build:
    """A stage that some trials need."""

    node: Node
    trials: list[int] = field(default_factory=list)
    seconds: float | None = None
    measured: Measured | None = None
    peak: tuple[str, float] | None = None  # of the memory plan: when, and bytes on a rank


def show(plan: Plan, trials: Sequence[grid.Composed]) -> int:
    """Print it; returns the exit code. Nothing is written, nothing trained."""
    if trials:
        print(f"{len(trials)} trial{'s' * (len(trials) > 1)}")
    else:  # one stands for all
        print("the sweeper chooses the trials as it goes; one of them, with the first value of each key:")
        trials = [grid.Composed(0, [], plan.config, [], [])]
    builds, problems = needed(trials)
    keys = table.swept({one.number: ledger.State(one.number, one.overrides) for one in trials})
    for one in trials:
        own = [b for b in builds.values() if b.trials == [one.number]]
        values = table.values_of(one.overrides)
        named = " ".join([f"trial {one.number}", *(f"{key}={values[key]}" for key in keys if key in values)])
        said = "; ".join(f"cannot run: {problem}" for problem in problems.get(one.number, []))
        print(f"  {named}: {said or ', '.join(map(line, own)) or 'what it shares is all it needs'}")
    shared = [build for build in builds.values() if len(build.trials) > 1]
    for build in shared:
        times = "cached" if build.node.folder else "trained once"
        print(f"  {times} for {len(build.trials)} trials: {line(build)}")
    print(total(builds.values()))
    if said := largest(builds.values()):
        print(said)
    return EXIT_BAD_INPUT if len(problems) == len(trials) else 0


def line(build: Build) -> str:
    """A stage and what it costs."""
    node = build.node
    if node.folder:
        return f"{node.name} {node.key[:6]} (cached)"
    cost = UNKNOWN if build.seconds is None else duration(build.seconds)
    return f"{node.name} {node.key[:6]} ({cost})"


def total(builds: Iterable[Build]) -> str:
    """The sum, and what it stands on."""
    todo = [build for build in builds if not build.node.folder]
    known = [build for build in todo if build.seconds is not None]
    if not todo:
        return "nothing has to be trained"
    seconds = sum(build.seconds for build in known)
    said = f"to build: {len(todo)} runs, one after the other {duration(seconds)} ({seconds / 3600:.2g} hours)"
    if len(known) < len(todo):
        stages = ", ".join(dict.fromkeys(b.node.stage for b in todo if b.seconds is None))
        missing = f"{len(todo) - len(known)} of them {UNKNOWN}: no finished run of {stages} with this model"
        said = missing if not known else f"{said}; {missing}"
    lines = [said]
    for measured in dict.fromkeys(build.measured for build in known):
        step = "" if measured.step is None else f"{measured.step:.3g} s a step, "
        other = f"; other {', '.join(measured.differs)}" if measured.differs else ""
        lines.append(f"  measured: {measured.name}, {step}{measured.rest:.3g} s beside{other}")
    return "\n".join(lines)


def largest(builds: Iterable[Build]) -> str:
    """Of what is to be built, the stage that needs most memory; "" where nobody knows."""
    known = [build for build in builds if not build.node.folder and build.peak]
    if not known:
        return ""
    most = max(known, key=lambda build: build.peak[1])
    (phase, need), who = most.peak, f"{most.node.name} {most.node.key[:6]}"
    return (
        f"memory: at most {gigabytes(need)}, in {phase} of {who}; dry_run=true without the sweep says what of"
    )


def needed(trials: Sequence[grid.Composed]) -> tuple[dict[str, Build], dict[int, list[str]]]:
    """Key -> a stage that has to be there, in an order in which they can be built; trial -> why it cannot run."""
    from rlhf_exp.stages import memory
    from rlhf_exp.stages import plan as stages

    found: dict[str, Build] = {}
    problems: dict[int, list[str]] = {}
    entries: dict[str, list[Entry]] = {}
    for one in trials:
        try:
            run, choices = compose.to_run(one.config), compose.choices_of(one.config.hydra)
            if run.stage == "report":
                raise InputError("a report is made in seconds: leave dry_run out")
            todo = stages.make(run, choices)
        except InputError as error:
            problems[one.number] = error.problems
            continue
        for node in todo.nodes:
            if node.config is None:
                continue
            build = found.setdefault(node.key, Build(node))
            build.trials.append(one.number)
            if len(build.trials) == 1 and not node.folder:
                place = str(node.config.output_dir)
                known = entries.setdefault(place, finished(Path(place)))
                build.measured = nearest(node, known)
                build.seconds = seconds_of(node, build.measured)
                build.peak = memory.peak_of(node, todo)
    return found, problems


def finished(output_dir: Path) -> list[Entry]:
    """The finished runs of a store; [] where there is none."""
    from rlhf_exp.store.listing import scan
    from rlhf_exp.store.runs import FINISHED

    return [e for e in scan(output_dir) if e.state == FINISHED] if output_dir.is_dir() else []


def nearest(node: Node, entries: Sequence[Entry]) -> Measured | None:
    """The run of the same stage and model that agrees with the node in most of COST; of several the newest."""
    from dataclasses import asdict

    from rlhf_exp.store.show import flat, read_config

    wanted = flat(asdict(node.config))
    best: tuple[int, str, Measured] | None = None
    for e in entries:
        if e.stage != node.stage:
            continue
        theirs = read_config(e)
        if theirs.get("model.name") != node.config.model.name:
            continue
        differs = tuple(key for key in COST if key in wanted and wanted[key] != theirs.get(key))
        rank = (-len(differs), str(e.record.get("ended")))
        if (best is None or rank > best[:2]) and (measured := measure(e, differs)):
            best = (*rank, measured)
    return best[2] if best else None


def measure(e: Entry, differs: tuple[str, ...] = ()) -> Measured | None:
    """What a finished run took; None where it does not say."""
    from rlhf_exp.tracking import read_metrics

    seconds = e.record.get("seconds")
    if not seconds:
        return None
    lines = read_metrics(e.path / "metrics.jsonl")
    each = [sum(float(row[name]) for name in TIMES) for row in lines if all(name in row for name in TIMES)]
    if each:
        return Measured(e.name, statistics.median(each), max(seconds - sum(each), 0.0), differs)
    steps = max((row["step"] for row in lines if "train/loss" in row), default=0)
    if steps:
        return Measured(e.name, seconds / steps, 0.0, differs)
    return Measured(e.name, None, seconds, differs)


def seconds_of(node: Node, measured: Measured | None) -> float | None:
    """What the node will take, by what another run took."""
    if measured is None:
        return None
    if measured.step is None:
        return measured.rest
    steps = steps_of(node)
    return None if steps is None else measured.rest + steps * measured.step


def steps_of(node: Node) -> int | None:
    """Steps of a training; None where they are known only later."""
    from rlhf_exp.data.load import load_view
    from rlhf_exp.schema import view_of
    from rlhf_exp.stages.supervised import steps_of as trainer_steps

    config: Any = node.config
    if hasattr(config, "ppo"):
        return config.ppo.steps
    if not hasattr(config, "train"):
        return None
    if config.train.steps:
        return config.train.steps
    try:
        return trainer_steps(config.train, len(load_view(config.dataset, view_of(config), "train")))
    except InputError:  # labelled by a stage before
        return None
