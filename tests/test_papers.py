"""docs/papers.md: each function, test and key that it names exists, and what cites a paper is in it."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from rlhf_exp import schema
from rlhf_exp.fields import leaves

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["paper", "says", "function", "test", "key"]
LINES = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").splitlines()
# a table row; the header and the line under it are no rows
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if line.startswith("| ")]
ROWS = [row for row in ROWS if row != COLUMNS]


def names(cell: str) -> list[str]:
    found = re.findall(r"`([^`]+)`", cell)
    # nothing but names and commas: no forgotten backtick hides a name from the checks below
    assert re.sub(r"`[^`]+`", "", cell).strip(", ") == "", cell
    return found


@cache
def defined(path: Path) -> set[str]:
    """Functions and classes of a module, and `Class.method`, by parsing: nothing heavy is imported."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)
            }
    return found


def test_there_are_rows_and_each_has_all_columns():
    assert len(ROWS) > 40
    assert [row for row in ROWS if len(row) != len(COLUMNS)] == []


def test_no_number_is_in_doubt():
    assert [row[0] for row in ROWS if "?" in row[0].replace("Helping or herding?", "")] == []


def test_ilqls_sources_have_no_numbers_here_or_in_the_code():
    """None could be confirmed: secondary sources contradict each other."""
    cited = [row[0] for row in ROWS if re.search(r"Snell|Kostrikov|Nair|Kumar", row[0])]
    assert len(cited) == 6
    text = "\n".join(cited) + (ROOT / "rlhf_exp" / "algorithms" / "ilql.py").read_text(encoding="utf-8")
    numbers = re.findall(r"(?:section|eq\.) \d[\d.]*\d|(?:section|eq\.) \d", text)
    assert numbers == ["section 4.2"]  # of TD3, Fujimoto et al. 2018


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_what_a_row_names_exists(row):
    _, _, functions, tests, keys = row
    for name in (chosen := names(functions)):
        module, function = name.split(":")
        assert function in defined(ROOT / "rlhf_exp" / f"{module.replace('.', '/')}.py"), name
    for name in (held := names(tests)):
        file, test = name.split("::")
        assert test.startswith("test_") and test in defined(ROOT / "tests" / file), name
    assert chosen and held
    every = {key for run in schema.RUNS.values() for key, _, _ in leaves(run())}
    assert set(names(keys)) <= every


def test_every_algorithm_that_cites_a_paper_is_in_the_table():
    """A year in the docstring of a public function of algorithms/ is a citation."""
    listed = {name for row in ROWS for name in names(row[2])}
    missing = []
    for path in sorted((ROOT / "rlhf_exp" / "algorithms").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public and re.search(r"\b(19|20)\d\d\b", ast.get_docstring(node) or ""):
                name = f"algorithms.{path.stem}:{node.name}"
                missing += [name] if name not in listed else []
    assert missing == []
