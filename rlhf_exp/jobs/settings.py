"""What jobs ask for. Hydra's `hydra/launcher=slurm` is made of these dataclasses; nothing here knows Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from rlhf_exp.schema.names import STAGES

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
NO_LIMIT = ("UNLIMITED", "INFINITE")
# option -> how sbatch reads it, and that in words
FORMS = {
    "time": (
        re.compile(rf"{TIME.pattern}|{'|'.join(NO_LIMIT)}", re.IGNORECASE),
        "minutes, hours:minutes:seconds or days-hours",
    ),
    "mem": (re.compile(r"\d+(?:[KMGT]B?)?", re.IGNORECASE), "a number with K, M, G or T, such as 16G"),
    "gpus_per_node": (
        re.compile(r"(?:[\w.-]+:)?\d+(?:,(?:[\w.-]+:)?\d+)*"),
        "a number, or a type with it, such as a100:2",
    ),
}


@dataclass
class Resources:
    """In sbatch's own words (underscores for its dashes); null: what the cluster gives by default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None  # nodes not to use: node[3-5]
    time: str | None = None  # limit: minutes, or hours:minutes:seconds, or days-hours
    nodes: int | None = None
    tasks_per_node: int | None = None  # processes; with nodes: RANK and WORLD_SIZE of torch.distributed
    cpus_per_task: int | None = None
    gpus_per_node: str | None = None  # 2, or with a type: a100:2
    mem: str | None = None  # of each node: 16G
    setup: list[str] | None = None  # shell lines before the program: module load cuda/12
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch


# a field for each stage, so that `hydra.launcher.by_stage.sft.mem=8G` needs no + and a typing error is one
ByStage = make_dataclass(
    "ByStage", [(stage, Resources, field(default_factory=Resources)) for stage in STAGES]
)
ByStage.__module__ = __name__


@dataclass
class Settings(Resources):
    """Of all jobs, and how the launcher goes about it."""

    by_stage: ByStage = field(default_factory=ByStage)  # what is set for a stage wins
    name: str = "rlhf_exp"  # shown by squeue, followed by the stage
    array_parallelism: int = 256  # trials of one array that run at a time
    signal_delay_s: int = (
        120  # seconds before the time limit in which a job saves and is put back into the queue
    )
    max_requeues: int = 5  # how often a job may start again, for whatever reason
    wait: bool = True  # false: return when the jobs are submitted; python -m rlhf_exp.jobs has the rest
    poll_s: float = 3.0  # seconds between two looks at the jobs
    dry_run: bool = False  # print the sbatch scripts and stop


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings from plain dicts and lists, as they are in a sweep's folder."""
    plain = dict(values)
    stages = {stage: Resources(**given) for stage, given in (plain.pop("by_stage", None) or {}).items()}
    return Settings(**plain, by_stage=ByStage(**stages))


def problems(settings: Settings) -> list[str]:
    """What is out of range, a line each."""
    bounds = {"array_parallelism": 1, "signal_delay_s": 0, "max_requeues": 0, "poll_s": 0.1}
    found = [
        f"hydra.launcher.{name} must be at least {least}, got {getattr(settings, name)}"
        for name, least in bounds.items()
        if getattr(settings, name) < least
    ]
    places = {"": settings, **{f"by_stage.{stage}.": getattr(settings.by_stage, stage) for stage in STAGES}}
    for place, resources in places.items():
        for name in ("nodes", "tasks_per_node", "cpus_per_task"):
            value = getattr(resources, name)
            if value is not None and value < 1:
                found.append(f"hydra.launcher.{place}{name} must be at least 1, got {value}")
        for name, (form, words) in FORMS.items():
            value = getattr(resources, name)
            if value is not None and not form.fullmatch(str(value)):
                found.append(f"hydra.launcher.{place}{name} must be {words}, got {value}")
        limit = seconds(resources.time)
        if limit is not None and limit <= settings.signal_delay_s:
            found.append(
                f"hydra.launcher.{place}time={resources.time} is over before the job is asked to save, "
                f"hydra.launcher.signal_delay_s={settings.signal_delay_s} seconds before its end"
            )
    return found


def seconds(time: str | None) -> int | None:
    """A limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None for what is not one of these."""
    found = TIME.fullmatch(time or "")
    if found is None:
        return None
    days, rest = found["days"], [int(part) for part in found["rest"].split(":")]
    if days is not None:
        hours, minutes, more = [*rest, 0, 0][:3]
    elif len(rest) == 3:
        hours, minutes, more = rest
    else:
        hours, minutes, more = 0, *[*rest, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + more


def ranks_of(settings: Settings, stage: str) -> int:
    """Processes of a job of this stage."""
    found = resources_of(settings, stage)
    return (found.nodes or 1) * (found.tasks_per_node or 1)


def resources_of(settings: Settings, stage: str) -> Resources:
    """What a job of this stage asks for: the stage's own where it is set, else the common one."""
    own = getattr(settings.by_stage, stage)
    values = {}
    for f in fields(Resources):
        given = getattr(own, f.name)
        values[f.name] = getattr(settings, f.name) if given is None else given
    values["additional_parameters"] = {**settings.additional_parameters, **own.additional_parameters}
    return Resources(**values)
