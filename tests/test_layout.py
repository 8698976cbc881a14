"""Who may import whom: the package's sources are parsed, nothing is imported.

cli -> schema, stages, tracking, store      stages -> everything below
evaluation, rewards, rollout -> model, algorithms, data      data -> schema      model -> algorithms, schema
algorithms -> torch only, and which processor it is      schema -> the standard library and omegaconf.MISSING
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_exp"

# Part -> the parts it may import, besides itself and EVERYBODY. A part is a module or a whole folder.
EVERYBODY = {"__version__", "distributed", "errors", "fields", "paths", "processor", "model.quiet"}
COMMAND_LINE = {"schema", "conftree", "overrides"}
MATHS = {"algorithms", "data", "model", "schema"}
SWEEPS = {"sweeps.current", "sweeps.figures", "sweeps.ledger", "sweeps.pruning"}
STAGES = {
    *MATHS,
    "compose",
    "evaluation",
    "fetch",
    "memory",
    "probes",
    "progress",
    "rewards",
    "rollout",
    "store",
    "strategies",
    "sweeps.current",
    "sweeps.figures",
    "sweeps.pruning",
    "tracking",
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "fields": set(),
    "paths": set(),
    "processor": set(),
    "model.quiet": set(),
    "distributed": set(),
    "schema": set(),
    "algorithms": set(),
    "progress": set(),
    "store": {"schema"},
    "tracking": {"schema", "store", "progress"},
    "fetchable": set(),
    "fetch": {"fetchable", "store"},
    "data": {"schema", "store"},
    "model": {"algorithms", "schema", "store", "fetch"},
    "memory": {"model", "schema"},
    "simulate": {"memory", "store", "tracking"},
    "rollout": MATHS,
    "rewards": MATHS,
    "evaluation": {*MATHS, "rewards", "rollout", "store", "tracking"},
    "probes": {*MATHS, "evaluation", "rewards"},
    "conftree": {"schema"},
    "overrides": COMMAND_LINE,
    "compose": COMMAND_LINE,
    "helppage": {*COMMAND_LINE, "compose"},
    "modelpage": {"conftree"},
    # what stages may know of the sweep they are in, and what it stands on
    "sweeps.current": {"store"},
    "sweeps.figures": {"store"},
    "sweeps.ledger": {"store"},
    "sweeps.pruning": {"sweeps.current", "sweeps.figures", "sweeps.ledger", "schema", "store"},
    "sweeps": {
        *COMMAND_LINE,
        "cli",
        "compose",
        "data",
        "evaluation",
        "memory",
        "progress",
        "stages",
        "store",
        "tracking",
        *SWEEPS,
    },
    "strategies": {"model", "schema"},
    "jobs": {"compose", "distributed", "schema", "stages", "store", "strategies", "sweeps", *SWEEPS},
    "stages": STAGES,
    "cli": {
        *COMMAND_LINE,
        "compose",
        "helppage",
        "progress",
        "stages",
        "store",
        "strategies",
        "sweeps",
        "tracking",
    },
    "__main__": {"cli"},
}
# parts that may import nothing of the package but this
STRICT = {
    "schema": {"fields"},
    "algorithms": {"processor"},
    "errors": set(),
    "fields": set(),
    "paths": {"errors"},
}

# OmegaConf's containers stop here, below are dataclasses. Anybody may know what a missing value looks like.
CONFIG_PARTS = {"cli", "compose", "overrides", "sweeps"}
# `--cfg job`, `--help`, looking for a model or into the store answer at once: HEAVY is imported in functions
LIGHT_ENTRIES = ("cli", "compose", "helppage", "fetch", "store.__main__")
HEAVY = {
    *(
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "peft",
        "trl",
        "accelerate",
        "datasets",
        "gguf",
        "pyarrow",
    ),
    *(
        "deepspeed",
        "mlflow",
        "sqlalchemy",
        "numpy",
        "scipy",
        "pandas",
        "matplotlib",
        "vaderSentiment",
        "huggingface_hub",
    ),
}


@dataclass(frozen=True)
class Import:
    """`target` is absolute, `name` what is taken out of it (or None), `function` None at module level."""

    module: str
    target: str
    name: str | None
    function: str | None
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.target}" + (f" ({self.name})" if self.name else "")


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _walk(node: ast.AST, function: str | None) -> Iterator[tuple[ast.stmt, str | None]]:
    """Import statements with the outermost function around them; without those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, function
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, function or child.name)
        elif _is_type_checking(child):
            yield from _walk(ast.Module(child.orelse, []), function)
        else:
            yield from _walk(child, function)


def imports(package: Path) -> list[Import]:
    """Every import of every module of a package; module names without the package's own."""
    found = []
    for path in sorted(package.rglob("*.py")):
        module = _module_name(path, package)
        for node, function in _walk(ast.parse(path.read_text(encoding="utf-8")), None):
            if isinstance(node, ast.Import):
                found += [Import(module, alias.name, None, function, node.lineno) for alias in node.names]
                continue
            assert isinstance(node, ast.ImportFrom)
            assert not node.level, f"{path}:{node.lineno}: relative import; write the whole name"
            found += [Import(module, node.module or "", a.name, function, node.lineno) for a in node.names]
    return found


def _inner(package: Path, one: Import) -> str | None:
    """The module of the package that is imported, without the package's name; None for another's."""
    if one.target.split(".")[0] != package.name:
        return None
    target = one.target.partition(".")[2]
    submodule = f"{target}.{one.name}".strip(".")
    path = package.joinpath(*submodule.split("."))
    if one.name == "__version__" and not target:
        return "__version__"
    return submodule if one.name and (path.is_dir() or path.with_suffix(".py").is_file()) else target


def _part(module: str, parts: Iterable[str]) -> str | None:
    """The longest name in `parts` that is the module or a folder above it."""
    fitting = [part for part in parts if module == part or module.startswith(part + ".")]
    return max(fitting, key=len, default=None)


def wrong_directions(package: Path) -> list[str]:
    """Imports inside the package that ALLOWED does not have, and modules that it does not know."""
    parts = {*ALLOWED, *EVERYBODY}
    wrong = []
    for path in sorted(package.rglob("*.py")):
        module = _module_name(path, package)
        if module and _part(module, ALLOWED) is None:
            wrong.append(f"{module}: in no part that ALLOWED knows")
    for one in imports(package):
        target, part = _inner(package, one), _part(one.module, ALLOWED)
        if target is None or part is None:
            continue
        goal = _part(target, parts)
        allowed = STRICT[part] if part in STRICT else ALLOWED[part] | EVERYBODY
        if goal not in allowed | {part}:
            wrong.append(str(one))
    return wrong


def foreign(package: Path, part: str) -> set[str]:
    """Top-level names outside the package and the standard library that a part imports."""
    names = {one.target.split(".")[0] for one in imports(package) if _part(one.module, ALLOWED) == part}
    return names - set(sys.stdlib_module_names) - {package.name}


def config_leaks(package: Path) -> list[str]:
    """Hydra or OmegaConf below the command line, but for schema.runs.register and the mark of a missing value."""
    leaks = []
    for one in imports(package):
        root, part = one.target.split(".")[0], _part(one.module, ALLOWED)
        if root not in ("hydra", "omegaconf") or part in CONFIG_PARTS:
            continue
        registers = root == "hydra" and one.module == "schema.runs" and one.function == "register"
        if not registers and (one.target, one.name) != ("omegaconf", "MISSING"):
            leaks.append(str(one))
    return leaks


def heavy_at_once(package: Path, entries: Iterable[str] = LIGHT_ENTRIES) -> list[str]:
    """HEAVY imports that importing one of `entries` runs: its module level, and that of what this imports."""
    top: dict[str, list[Import]] = {}
    for one in imports(package):
        if one.function is None:
            top.setdefault(one.module, []).append(one)
    found, seen, todo = [], set(), [entry for entry in entries]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        todo += [module.rpartition(".")[0]]  # importing a.b runs a's __init__
        for one in top.get(module, []):
            inner = _inner(package, one)
            if inner is not None:
                todo.append(inner)
            elif one.target.split(".")[0] in HEAVY:
                found.append(str(one))
    return found


def test_imports_go_down_only():
    assert wrong_directions(PACKAGE) == []


def test_algorithms_stand_on_torch_alone():
    assert foreign(PACKAGE, "algorithms") == {"torch"}


def test_schema_stands_on_the_standard_library():
    assert foreign(PACKAGE, "schema") <= {"omegaconf", "hydra"}  # where in it: config_leaks


def test_hydra_and_omegaconf_stop_at_the_command_line():
    assert config_leaks(PACKAGE) == []


def test_nothing_heavy_is_imported_before_it_is_needed():
    assert heavy_at_once(PACKAGE) == []


@pytest.fixture
def package(tmp_path):
    """package({"a/b.py": source}): a package called rlhf_exp of these files."""

    def make(sources: dict[str, str]) -> Path:
        for name, source in sources.items():
            path = tmp_path / "rlhf_exp" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return tmp_path / "rlhf_exp"

    return make


def test_a_wrong_direction_is_found(package):
    root = package(
        {
            "__init__.py": "__version__ = '1'",
            "errors.py": "",
            "newcomer.py": "",
            "model/base.py": "from rlhf_exp import __version__\nfrom rlhf_exp.errors import InputError",
            "data/load.py": "from rlhf_exp import model\ndef f():\n    import rlhf_exp.stages.sft",
            "algorithms/gae.py": "import rlhf_exp.errors\nfrom rlhf_exp.algorithms import ppo",
            "schema.py": "from rlhf_exp.paths import cache_dir",
        }
    )
    assert wrong_directions(root) == [
        "newcomer: in no part that ALLOWED knows",
        "algorithms.gae:1: rlhf_exp.errors",
        "data.load:1: rlhf_exp (model)",
        "data.load:3: rlhf_exp.stages.sft",
        "schema:1: rlhf_exp.paths (cache_dir)",
    ]


def test_a_relative_import_is_refused(package):
    with pytest.raises(AssertionError, match="relative import"):
        imports(package({"model/base.py": "from . import roles"}))


def test_config_below_the_command_line_is_found(package):
    root = package(
        {
            "compose.py": "import hydra\nfrom omegaconf import DictConfig",
            "schema/runs.py": (
                "from omegaconf import MISSING\ndef register():\n    from hydra.core import x\n"
                "def other():\n    from hydra.core import y\n"
            ),
            "stages/sft.py": "from omegaconf import MISSING, OmegaConf",
            "model/base.py": "def f():\n    import omegaconf",
        }
    )
    assert config_leaks(root) == [
        "model.base:2: omegaconf",
        "schema.runs:5: hydra.core (y)",
        "stages.sft:1: omegaconf (OmegaConf)",
    ]


def test_a_heavy_import_is_found_through_others(package):
    root = package(
        {
            "cli.py": "import json\nfrom rlhf_exp.store import keys\ndef f():\n    import mlflow",
            "store/__init__.py": "from rlhf_exp.store.runs import Run",
            "store/keys.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
            "store/runs.py": "try:\n    import numpy.random\nexcept ImportError:\n    pass",
            "stages/sft.py": "import torch",
        }
    )
    assert heavy_at_once(root, ["cli"]) == ["store.runs:2: numpy.random"]
