"""The files of conf/: groups, options, the comments at their tops. No Hydra: the help page must be quick."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_exp import schema

# in the order of the help page; other groups (of --config-dir) follow by name
ORDER = (
    "stage",
    "experiment",
    "model",
    "lora",
    "dataset",
    "dataset/template",
    "ppo",
    "ilql",
    "generation",
    "reward_source",
    "strategy",
    "tracking",
    "sweep",
)
# groups that every stage has and that fill no section of the same name
EVERYWHERE = ("stage", "experiment", "sweep")
STAGE_OVERRIDE = re.compile(r"^\s*-\s*override\s+/?stage:\s*(\w+)", re.MULTILINE)

Tree = dict[str, dict[str, Path]]


def read(folders: Sequence[Path]) -> Tree:
    """{group: {option: file}} of one or more config trees; where two have a file, the first has it."""
    found: Tree = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            if group != ".":
                found.setdefault(group, {}).setdefault(path.stem, path)
    rank = {group: place for place, group in enumerate(ORDER)}
    return {group: found[group] for group in sorted(found, key=lambda g: (rank.get(g, len(ORDER)), g))}


def comments(path: Path) -> list[str]:
    """The comment lines at the top of a config file, without `#` and without Hydra's (`# @package ...`)."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if text and not text.startswith("@"):
            lines.append(text)
    return lines


def stage_of(experiment: Path) -> str | None:
    """The stage that an experiment file chooses."""
    found = STAGE_OVERRIDE.search(experiment.read_text(encoding="utf-8"))
    return found[1] if found else None


def has_group(stage: str, group: str) -> bool:
    """Whether a stage has this group (`dataset/template` fills the section dataset.template)."""
    return group in EVERYWHERE or group.replace("/", ".") in schema.keys(stage)
