"""`show`: one run with its inputs, config, metrics and the tree of its parents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from rlhf_exp.store import listing
from rlhf_exp.store.frozen import CONFIG
from rlhf_exp.store.listing import Entry
from rlhf_exp.store.manifest import CorruptArtifact, listed
from rlhf_exp.store.runs import FINISHED


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {"a.b": value}; an empty one has no leaves."""
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree} if prefix else {}
    merged: dict[str, Any] = {}
    for name, value in tree.items():
        merged |= flat(value, f"{prefix}{name}.")
    return merged


def read_config(e: Entry) -> dict[str, Any]:
    """The leaves of config.yaml; {} if it is not there or cannot be read."""
    import yaml

    try:
        return flat(yaml.safe_load((e.path / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _pairs(pairs: dict[str, Any], text: Callable[[Any], str] = str) -> Table:
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True)
    rows.add_column()
    for name, value in pairs.items():
        rows.add_row(escape(name), escape(text(value)))
    return rows


def _section(title: str, pairs: dict[str, Any], text: Callable[[Any], str]) -> list[RenderableType]:
    return [f"\n[bold]{title}[/]", _pairs(pairs, text)] if pairs else []


def _files(e: Entry) -> str:
    """Whether the files are what they were when the run finished."""
    if e.record.get("status") != FINISHED:
        return "not finished: not verified"
    try:
        e.folder.verify()
    except CorruptArtifact as error:
        return "; ".join(error.problems)
    return f"{len(listed(e.path))} files, verified"


def _branch(tree: Tree, output_dir: Path, parents: dict[str, Any], above: frozenset[str]) -> None:
    entries = listing.scan(output_dir) if output_dir.is_dir() else []
    for role, parent in parents.items():
        stage, key = parent.get("stage"), str(parent.get("key"))
        label = f"{role} = {stage} {key[:12]}"
        same = [e for e in entries if e.key == key and e.stage == stage]
        # a run made with resume=never has a namesake: the path tells them apart
        folder = Path(str(parent.get("path"))).name
        found = next((e for e in same if e.path.name == folder), same[0] if same else None)
        if found is None:
            tree.add(escape(f"{label}: not in {output_dir} (was {parent.get('path')})"))
        elif key not in above:
            branch = tree.add(escape(f"{label}: {found.state}, {listing.when_text(found)}, {found.path}"))
            _branch(branch, output_dir, found.inputs["parents"], above | {key})


def render(e: Entry, output_dir: Path) -> Group:
    """Everything that the folder knows about its run."""
    record = e.record
    summary = {
        "folder": str(e.path),
        "key": e.key,
        "status": e.state,
        "problem": e.problem,
        "started": record.get("started"),
        "ended": record.get("ended"),
        "seconds": record.get("seconds"),
        "size": listing.human(e.size),
        "files": _files(e),
        "error": record.get("error"),
        "mlflow_run_id": record.get("mlflow_run_id"),
        "version": record.get("version"),
    }
    tree = Tree(f"{e.stage} {e.key[:12]}")
    _branch(tree, output_dir, e.inputs["parents"], frozenset({e.key}))
    base = {f"base.{name}": value for name, value in e.inputs["base"].items()}
    data = {f"data.{view}": value for view, value in e.inputs["data"].items()}
    return Group(
        f"[bold]{escape(e.name)}[/]",
        _pairs({name: value for name, value in summary.items() if value is not None}),
        *_section("inputs", base | data, str),
        *_section("metrics", dict(listing.numbers(record.get("metrics"))), listing.figure),
        *_section("config", read_config(e), listing.exact),
        "\n[bold]parents[/]",
        tree,
    )
