"""docs/recipes: a page for every published recipe, whose tables and commands say what the configs say."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_exp import compose, conftree, schema
from rlhf_exp.paths import conf_dir
from rlhf_exp.stages.plan import needs

DOCS = Path(__file__).resolve().parents[2] / "docs"
OWN = {"quickstart", "smoke", "post_mortem", "best_of_all"}  # ours, not published by anybody
EXPERIMENTS = sorted({path.stem for path in (conf_dir() / "experiment").glob("*.yaml")} - OWN)
PAGES = sorted(path for path in (DOCS / "recipes").glob("*.md") if path.name != "README.md")
PROGRAM = ["python", "-m", "rlhf_exp"]
HEAD = ("stage", "key", "theirs", "ours", "where")
HEADINGS = ("## Published", "## Settings", "## Differences", "## What it costs", "## Small")


def page(name: str) -> str:
    return (DOCS / "recipes" / f"{name}.md").read_text(encoding="utf-8")


def tables(text: str) -> list[tuple[str, ...]]:
    """The rows below a head of our five columns: their cells."""
    rows, inside = [], False
    for line in text.splitlines():
        cells = tuple(cell.strip() for cell in line.strip().strip("|").split(" | "))
        if line.startswith("|"):
            if inside and not set(line) <= set("|-: "):
                rows.append(cells)
            inside = inside or cells == HEAD
        else:
            inside = False
    return rows


def plain(cell: str) -> str:
    """What stands in the cell's backticks; the cell must hold nothing else."""
    assert re.fullmatch(r"`[^`]+`", cell), f"{cell!r} is not `one thing in backticks`"
    return cell.strip("`")


def number(value: Any) -> Any:
    """yaml reads 1e-4 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@cache
def composed(experiment: str) -> dict[str, schema.Run]:
    """The config of every stage that the experiment runs."""
    run, choices = compose.compose([f"experiment={experiment}"])
    stages = {*needs("eval" if run.stage == "pipeline" else run.stage, run)}
    stages |= {"eval"} if run.stage == "pipeline" else {run.stage}
    found = {stage: compose.upstream(stage, run, choices)[0] for stage in stages - {run.stage}}
    return found | ({run.stage: run} if run.stage != "pipeline" else {})


def commands(text: str) -> list[list[str]]:
    """The program's overrides in each command of the page's code blocks, continued lines joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if " -m rlhf_exp " in line else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:3] == PROGRAM:
                found.append(words[3:])
    return found


def test_every_recipe_has_a_page_and_every_page_a_recipe():
    assert [path.stem for path in PAGES] == EXPERIMENTS
    assert len(EXPERIMENTS) >= 9


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_page_has_its_command_and_its_parts(experiment):
    text = page(experiment)
    command = conftree.comments(conf_dir() / f"experiment/{experiment}.yaml")[0]
    assert shlex.split(command)[3:] in commands(text)
    assert [heading for heading in HEADINGS if f"\n{heading}" not in text] == []
    assert f"({experiment}.md)" in (DOCS / "recipes/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_table_says_what_the_config_says(experiment):
    rows, configs = tables(page(experiment)), composed(experiment)
    assert len(rows) >= 8
    assert {row[0] for row in rows} <= set(configs)
    for row in rows:
        assert len(row) == len(HEAD), row
        stage, key, ours = row[0], plain(row[1]), yaml.safe_load(plain(row[3]))
        value: Any = configs[stage]
        for name in key.split("."):
            assert hasattr(value, name), f"{experiment}: {stage} has no key {key}"
            value = getattr(value, name)
        assert number(ours) == value, f"{experiment}: {stage} {key} is {value}, the page says {ours}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_what_an_experiment_sets_is_in_its_table(experiment):
    """So that a setting without a source is noticed; what only changes memory, length or looks may be left out."""
    written = yaml.safe_load((conf_dir() / f"experiment/{experiment}.yaml").read_text())
    said = {(row[0], plain(row[1])) for row in tables(page(experiment))}
    stage = "ppo" if "ppo" in composed(experiment) else "ilql"
    for section in ("ppo", "ilql", "optim", "generation"):
        for key in set(written.get(section, {})) - {"micro_batch_size", "save_every"}:
            assert (stage, f"{section}.{key}") in said
    for upstream in ("sft", "reward"):
        for section in ("train", "optim", "reward"):
            for key in set(written["upstream"].get(upstream, {}).get(section, {})) - {"micro_batch_size"}:
                assert (upstream, f"{section}.{key}") in said


@pytest.mark.parametrize("path", [*PAGES, DOCS / "recipes/README.md"], ids=lambda path: path.stem)
def test_every_command_of_a_page_composes(path):
    for words in commands(path.read_text(encoding="utf-8")):
        run, choices = compose.compose(words)
        for stage in needs("eval" if run.stage == "pipeline" else run.stage, run):
            if getattr(run.adapters, stage, None) is None:
                compose.upstream(stage, run, choices)
