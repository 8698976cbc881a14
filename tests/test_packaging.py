"""What an installation gets: dependencies, the pinned versions, the wheel, the Makefile's verbs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# the scripts of benchmarks/ are no package: tests put their folder on the path
OURS = {"rlhf_exp", "hydra_plugins", "tests", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}


def _requirements(group: str | None = None) -> dict[str, Requirement]:
    project = PROJECT["project"]
    lines = project["optional-dependencies"][group] if group else project["dependencies"]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def _imported(folder: Path) -> dict[str, Path]:
    """Top-level names that the modules of a folder import -> one module that does."""
    names = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0]: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names[node.module.split(".")[0]] = path
    return {name: path for name, path in names.items() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("folder", "groups"),
    [("rlhf_exp", [None, "quant"]), ("launchers", [None, "optuna"]), ("tests", [None, "test", "optuna"])],
)
def test_what_is_imported_is_declared(folder, groups):
    declared = set().union(*map(_requirements, groups))
    distributions = packages_distributions()
    undeclared = []
    for name, path in _imported(ROOT / folder).items():
        # of an extra that is not installed its name is all that is known
        owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
        if name not in OURS and not owners & declared:
            undeclared.append(
                f"{path.relative_to(ROOT)} imports {name} ({', '.join(owners) or 'not installed'})"
            )
    assert undeclared == []


def test_pins_are_plain_and_fit_the_ranges():
    pins = {canonicalize_name(name): version for name, version in _pins().items()}
    for name, version in pins.items():
        assert re.fullmatch(r"[0-9a-z.]+", version), f"{name}=={version}: no URL, no local version"
    for name, requirement in (_requirements() | _requirements("test") | _requirements("optuna")).items():
        assert Version(pins[name]) in requirement.specifier, requirement
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
    assert not {"pip", "setuptools", "rlhf-exp"} & set(pins)


def test_every_dependency_has_a_reason():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in (_requirements() | _requirements("test") | _requirements("dev")).values():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f'"{requirement.name}>')]
        assert re.search(r'",\s+# \w.{5,}', line), line


def test_console_script_is_the_command_line():
    assert PROJECT["project"]["scripts"] == {"rlhf-exp": "rlhf_exp.cli:main"}
    tree = ast.parse((ROOT / "rlhf_exp" / "cli.py").read_text(encoding="utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_lists_every_verb_with_a_line():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert {"help", "run", "test", "test-all", "mutants", "lint", "format", "clean"} <= set(verbs)
    shown = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make (\S+) +\S.{10,}$", shown, re.MULTILINE)
    assert sorted(listed) == sorted(verbs)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_python_make_says_what_to_do(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(["make", "install", "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: no Python 3.11 or later" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_wheel_has_the_config_tree_the_reviews_and_the_command(tmp_path):
    """Built as pip builds it, unpacked elsewhere, and run from there: no checkout beside it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("hatchling cannot be downloaded")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("rlhf_exp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    plugins = {"rlhf_local_pool", "rlhf_optuna", "rlhf_slurm"}
    assert {f"hydra_plugins/{name}/config.py" for name in plugins} <= names
    conf = {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {f"rlhf_exp/{path.as_posix()}" for path in conf} <= names
    assert {"rlhf_exp/conf/config.yaml", "rlhf_exp/data/reviews.jsonl", "rlhf_exp/cli.py"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "rlhf_exp",
        "hydra_plugins",
    }
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "rlhf-exp = rlhf_exp.cli:main" in (tmp_path / "site" / entry).read_text()
    assert any(name.endswith("licenses/LICENSE") for name in names)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    code = "import rlhf_exp.paths as p; print(p.__file__); print(p.conf_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    package = tmp_path / "site" / "rlhf_exp"
    assert done.stdout.splitlines() == [str(package / "paths.py"), str(package / "conf")]
