"""Which jobs a sweep takes: one for each upstream stage that is missing, one for each trial, and who waits for whom.

What trials share has one key and so becomes one job: nine KL values need one sft and one reward job. The graph is
kept in the sweep's folder (slurm.json, with the launcher's settings), so that a resume needs no planning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.jobs.settings import Settings, settings_of
from rlhf_exp.schema import Run
from rlhf_exp.store import atomic

FILE = "slurm.json"
DIGITS = 8  # of a key, in the name of an upstream job


@dataclass
class Upstream:
    """A stage that trials stand on. after: names of the upstream jobs that it stands on itself."""

    role: str  # of the plan's node: sft, reward, reward_1, gold ...
    stage: str
    trial: int  # whose config it is built from
    after: list[str] = field(default_factory=list)


@dataclass
class Graph:
    upstream: dict[str, Upstream] = field(
        default_factory=dict
    )  # name -> job, in an order in which they can run
    stages: dict[int, str] = field(default_factory=dict)  # number of a trial -> its stage
    after: dict[int, list[str]] = field(default_factory=dict)  # number of a trial -> upstream jobs


def add(graph: Graph, number: int, config: Run, choices: Mapping[str, str]) -> None:
    """Plan a trial, as it would be at its start, and enter its jobs. Raises InputError for what cannot be planned.

    The plan is made where the sweep is submitted. On a node with another device a dtype of `auto` can come out
    differently, and with it all keys; so a job is told a role, not a key, and plans anew: what is one job here is one
    there, and at worst it finds its result made already.
    """
    graph.stages[number], graph.after[number] = config.stage, []
    if config.stage == "report":
        return
    from rlhf_exp.stages import plan

    todo = plan.make(config, dict(choices))
    names = {node.key: f"{node.name}-{node.key[:DIGITS]}" for node in todo.missing if node is not todo.target}
    for node in todo.missing:
        if node is todo.target:
            continue
        parents = [names[parent.key] for parent in node.parents.values() if parent.key in names]
        job = Upstream(node.name, node.stage, number, list(dict.fromkeys(parents)))
        graph.upstream.setdefault(names[node.key], job)
        graph.after[number].append(names[node.key])


# ---------------------------------------------------------------- the file


def write(sweep: Path, graph: Graph, settings: Settings) -> None:
    content = {"settings": asdict(settings), **asdict(graph)}
    atomic.write_bytes(sweep / FILE, (json.dumps(content, indent=1) + "\n").encode())


def read(sweep: Path) -> tuple[Graph, Settings] | None:
    """None: the sweep was not given to SLURM. InputError where the file cannot be read."""
    try:
        content = json.loads((sweep / FILE).read_text(encoding="utf-8"))
        return _graph(content), settings_of(content["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{sweep / FILE} cannot be read ({type(error).__name__}: {error}): repeat the sweep's command with "
            f"hydra.sweep.dir={sweep}, without this file"
        ) from error


def _graph(content: Mapping[str, Any]) -> Graph:
    return Graph(
        {name: Upstream(**job) for name, job in content["upstream"].items()},
        {int(number): stage for number, stage in content["stages"].items()},
        {int(number): names for number, names in content["after"].items()},
    )


def needed(graph: Graph, numbers: Iterable[int]) -> list[str]:
    """The upstream jobs of these trials, each after those that it waits for."""
    wanted = {name for number in numbers for name in graph.after[number]}
    for name in reversed(list(graph.upstream)):
        if name in wanted:
            wanted.update(graph.upstream[name].after)
    return [name for name in graph.upstream if name in wanted]
