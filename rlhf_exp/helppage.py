"""The page of `--help`, and docs/config.md: both are made of the schema and the comments in conf/.

Standard library only, and no Hydra but for a stage's keys: the page comes at once. To make the reference anew:
`python -m rlhf_exp.helppage > docs/config.md`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass

from rlhf_exp import __version__, conftree, schema
from rlhf_exp.fields import range_text, type_text, walk
from rlhf_exp.paths import conf_dir

COMMAND = "python -m rlhf_exp"
EXAMPLES = (
    ("experiment=quickstart", "the whole way on this machine"),
    ("stage=ppo dataset=tldr dry_run=true", "what would be trained, and the memory it takes"),
    ("stage=ppo ppo.kl_coef=0.1 'upstream.sft={optim: {lr: 1e-4}}'", "set keys, also of the stages before"),
    ("stage=ppo sweep=kl", "a trial for each KL coefficient; the stages before train once"),
    ("stage=ppo model=baichuan7b --cfg job", "print a config, train nothing"),
)
FLAGS = (
    ("-h, --help", "this page; with stage=..., every key of that stage"),
    ("--cfg job", "print the composed config and stop; --package ppo: one section of it"),
    ("-m, --multirun", "a trial for each value of a list: ppo.kl_coef=0.05,0.1"),
    ("--config-dir DIR", "more options, laid out as conf/"),
    ("--info [WHAT]", "what Hydra composes from: defaults-tree, searchpath, ..."),
    ("--shell-completion install=bash", 'Tab completes groups, options and keys: eval "$(...)"'),
    ("--version", "print the version"),
)
DEFAULT = re.compile(r"^\s*-\s*/?([\w/]+):\s*(\w+)", re.MULTILINE)


def page(given: Sequence[str] = ()) -> str:
    """The help page; where `given` chooses a stage, that stage's keys."""
    stages = [word.removeprefix("stage=") for word in given if word.startswith("stage=")]
    if stages and stages[-1] in schema.RUNS:
        return _keys(stages[-1])
    tree = conftree.read([conf_dir()])
    lines = [
        f"{_bold('rlhf_exp')} {__version__}: SFT, reward model and PPO with LoRA on one frozen base model",
        "",
        f"{COMMAND} experiment=NAME | stage=NAME  [group=option ...] [key=value ...] [flags]",
    ]
    for group, options in tree.items():
        lines += ["", _title(group, tree)]
        names = [name for name in schema.STAGES if name in options] if group == "stage" else list(options)
        said = {name: conftree.comments(options[name]) for name in names}
        # the first line of an experiment is its command
        lines += _table([(name, " ".join(said[name][group == "experiment" :][:1])) for name in names])
    lines += ["", _bold("Examples")]
    for words, meaning in EXAMPLES:
        lines += [f"  {COMMAND} {words}", f"      {meaning}"]
    lines += ["", _bold("Flags"), *_table(FLAGS)]
    lines += ["", f"Keys: {COMMAND} stage=ppo --help lists them; so does docs/config.md."]
    return "\n".join(lines) + "\n"


def _keys(stage: str) -> str:
    lines = [
        f"{_bold(f'stage={stage}')}: keys with the values that they have where nothing is chosen, meaning"
    ]
    from rlhf_exp import compose

    composed = compose.defaults(stage)
    rows: list[tuple[str, str]] = []
    for key, f, value in walk(schema.RUNS[stage]()):
        if is_dataclass(value):
            lines += [*_table(rows), "", f"{_bold(key)}: {f.metadata['doc']}"]
            rows = []
        elif key != "stage":
            bounds = range_text(f)
            default = shown(composed.get(key, value))
            rows.append((f"{key}={default}", f.metadata["doc"] + (f" [{bounds}]" if bounds else "")))
    return "\n".join([*lines, *_table(rows)]) + "\n"


def _title(group: str, tree: conftree.Tree) -> str:
    """`model=...` with the default and, where not all stages have the group, those that do."""
    root = conf_dir()
    files = [root / "config.yaml", *tree["stage"].values(), *tree["dataset"].values()]
    defaults = {group: option for file in files for group, option in DEFAULT.findall(file.read_text("utf-8"))}
    notes = []
    default = defaults.get(group)
    if default in tree[group]:
        notes.append(f"default {default}")
    stages = [stage for stage in schema.STAGES if conftree.has_group(stage, group)]
    if len(stages) < len(schema.STAGES):
        notes.append(_of(stages))
    return _bold(f"{group}=...") + (f"  ({'; '.join(notes)})" if notes else "")


def _of(stages: Sequence[str]) -> str:
    """`stages ppo, eval`; `all stages but report`."""
    others = [stage for stage in schema.STAGES if stage not in stages]
    if not others:
        return "all stages"
    return f"all stages but {', '.join(others)}" if len(others) == 1 else f"stages {', '.join(stages)}"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns, the second wrapped to the terminal; a long word of the first has a line of its own."""
    if not rows:
        return []
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    column = min(max(len(name) for name, _ in rows), 32) + 4
    lines = []
    for name, meaning in rows:
        wrapped = textwrap.wrap(meaning, width - column, break_on_hyphens=False) or [""]
        head = f"  {name}".ljust(column)
        if len(head) > column or not head.endswith("  "):
            lines.append(head.rstrip())
            head = " " * column
        lines.append((head + wrapped[0]).rstrip())
        lines += [" " * column + line for line in wrapped[1:]]
    return lines


def _bold(words: str) -> str:
    return f"\033[1m{words}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else words


def shown(value: object) -> str:
    """A default as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, str):
        text = value.replace("\n", "\\n")
        return f'"{text}"' if not value or value != value.strip() else text
    return str(value)


def reference() -> str:
    """docs/config.md: every key with its type, default, range, part in the store key, and meaning."""
    sections: dict[str, dict[str, tuple[str, list[str]]]] = {}
    docs: dict[str, str] = {}
    for stage in schema.STAGES:
        unkeyed: list[str] = []  # sections that are out of the store key, with all that is in them
        for key, f, value in walk(schema.RUNS[stage]()):
            keyed = f.metadata["keyed"] and not any(key.startswith(f"{section}.") for section in unkeyed)
            if is_dataclass(value):
                docs.setdefault(key, f.metadata["doc"])
                unkeyed += [] if keyed else [key]
                continue
            meaning = f.metadata["doc"].replace("|", "\\|")
            bounds = range_text(f).replace("|", "\\|")
            default = "required" if value == "???" else f"`{shown(value)}`"
            row = (
                f"| `{key}` | {type_text(f)} | {default} | {bounds} | {'yes' if keyed else ''} | {meaning} |"
            )
            rows = sections.setdefault(key.rpartition(".")[0], {})
            rows.setdefault(key, (row, []))[1].append(stage)
    lines = [
        "# Configuration keys",
        "",
        "Made from `rlhf_exp/schema/` by `python -m rlhf_exp.helppage > docs/config.md`; do not edit.",
        "Defaults are those of the schema; an option of a group or a stage (`conf/`) may set others: `--cfg",
        "job` shows them. *Stored*: the value is part of the store key, that is, it can change a result.",
    ]
    for section, rows in sections.items():
        stages = next(iter(rows.values()))[1]
        where = _of(stages)
        lines += [
            "",
            f"## {section or 'Every run'}",
            "",
            f"{docs.get(section, 'Top-level keys.')} ({where})",
            "",
        ]
        lines += ["| key | type | default | range | stored | meaning |", "|---|---|---|---|---|---|"]
        lines += [row for row, _ in rows.values()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
