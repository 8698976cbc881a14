"""`diff`: what differs between the inputs of two runs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from rlhf_exp.fields import leaves
from rlhf_exp.schema import RUNS
from rlhf_exp.store import listing
from rlhf_exp.store.frozen import VERSIONS
from rlhf_exp.store.keys import FULL, of_adapter
from rlhf_exp.store.listing import Entry
from rlhf_exp.store.show import flat, read_config

ABSENT = object()  # a key that only the other run has; None is a value


class Difference(NamedTuple):
    part: str  # stage, config, base, data, parents, versions
    name: str
    a: Any
    b: Any
    keyed: bool  # whether it changes the store key


def _keyed_leaves(stage: str) -> set[str]:
    return {key for key, f, _ in leaves(RUNS[stage]()) if f.metadata["keyed"]} if stage in RUNS else set()


def _versions(e: Entry) -> dict[str, Any]:
    try:
        content = json.loads((e.path / VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kept = ("rlhf_exp", "git", "python", "platform", "packages")
    return flat({name: content[name] for name in kept if content.get(name) is not None})


def _parts(e: Entry) -> dict[str, dict[str, Any]]:
    inputs = e.inputs
    return {
        "stage": {"stage": e.stage},
        "config": read_config(e),
        "base": inputs["base"],
        "data": inputs["data"],
        "parents": {
            role: f"{p.get('stage')}/{str(p.get('key'))[:12]}" for role, p in inputs["parents"].items()
        },
        "versions": _versions(e),
    }


def differences(a: Entry, b: Entry) -> list[Difference]:
    """Every input that differs, in the order stage, config, base, data, parents, versions."""
    ours, theirs, found = _parts(a), _parts(b), []
    keyed = _keyed_leaves(a.stage) | _keyed_leaves(b.stage)
    if all(parts["config"].get(FULL) for parts in (ours, theirs)):
        keyed = {key for key in keyed if not of_adapter(key)}
    for part, left in ours.items():
        right = theirs[part]
        for name in [*left, *(name for name in right if name not in left)]:
            x, y = left.get(name, ABSENT), right.get(name, ABSENT)
            if x != y:
                outside = part == "versions" or (part, name) == ("base", "name")
                counts = name in keyed if part == "config" else not outside
                found.append(Difference(part, name, x, y, counts))
    return found


def render(a: Entry, b: Entry) -> Group:
    found = differences(a, b)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "name", a.name, b.name, "in key"):
        rows.add_column(column, overflow="fold")
    for d in found:
        left, right = ("-" if value is ABSENT else listing.exact(value) for value in (d.a, d.b))
        rows.add_row(d.part, escape(d.name), escape(left), escape(right), "yes" if d.keyed else "no")
    if not found:
        return Group(
            f"{escape(a.name)} and {escape(b.name)}: same stage, config, base, data, parents and versions"
        )
    parents = [d for d in found if d.part == "parents" and ABSENT not in (d.a, d.b)]
    hints = [f"the {d.name} parents differ: python -m rlhf_exp.store diff {d.a} {d.b}" for d in parents]
    return Group(rows, *(escape(f"\n{hint}") for hint in hints))
