"""The mutation check, `make mutants`: does some test notice each small mistake in rlhf_exp/algorithms?

Every change of tests/mutation.py is tried alone, on a copy of the package, against the tests of its module. A mutant
survives where all of them pass. Some change nothing that a caller can see: tests/mutants_equivalent.txt lists these
with the reason. Exit status 0 only when no other survives and the list has nothing else in it.

Why not a library: mutmut 3.8 leaves decorated functions alone (`gae` and all under `no_grad`), cosmic-ray 8.7 starts
a process for each mutant, which imports torch anew: 3 s times 1,500. Here torch is imported once and each mutant is
a fork, which compiles the changed tree and runs pytest in it until the first failure.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutation import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rlhf_exp.algorithms"
EQUIVALENT = "tests/mutants_equivalent.txt"
# the tests of a module, quick ones first; by default test_<module>.py
TESTS = {
    "ilql": ("test_ilql_arguments", "test_ilql"),
    "logprob": (
        *("test_logprob", "test_logits", "test_linear_logprobs", "test_repetition_logprobs"),
        "test_entropy_gradient",
    ),
    "repetition": ("test_repetition_logprobs", "test_entropy_gradient"),
}
LAST = "test_devices"  # about all modules
SECONDS = 20  # of processor time, so that a busy machine kills none; a mutant that takes longer loops
COPIED = ("rlhf_exp", "tests/algorithms", "tests/mutants.py", "tests/mutation.py", EQUIVALENT)
INI = """[pytest]
pythonpath = .
addopts = --import-mode=importlib
filterwarnings =
    ignore::DeprecationWarning
    error:::rlhf_exp
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help=f"of {PACKAGE}; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return check_all(options.modules, options.jobs)
    with tempfile.TemporaryDirectory(prefix="mutants.") as folder:
        for name in COPIED:
            source, copy = ROOT / name, Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        Path(folder, "pytest.ini").write_text(INI, encoding="utf-8")
        alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "tests.mutants", "--inside", *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env={**os.environ, **alone}).returncode


def check_all(modules: list[str], jobs: int) -> int:
    """All mutants of the modules; prints a line a module, then what is wrong. 0 when nothing is."""
    folder = ROOT / Path(*PACKAGE.split("."))
    every = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if unknown := sorted(set(modules) - set(every)):
        print(f"error: no module {', '.join(unknown)} in {PACKAGE}; there are {', '.join(every)}")
        return 2
    listed, wrong, begun = equivalent(ROOT / EQUIVALENT), [], time.monotonic()
    _import_what_tests_need()
    for module in modules or every:
        started = time.monotonic()
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        found = mutants(tree)
        if _wait(_fork(module, tree, None)) != 0:
            print(f"error: the tests of {module} fail without any change")
            return 2
        survived = {f"{module}.{m.name}": m for m in _survivors(module, tree, found, jobs)}
        expected = {name for name in listed if name.split(".")[0] == module}
        seconds = time.monotonic() - started
        print(
            f"{module:<12} {len(found):>4} mutants, {len(found) - len(survived):>4} killed,"
            f" {len(expected & survived.keys()):>3} equivalent, {len(survived.keys() - expected):>3} survived"
            f"   {seconds:4.0f} s",
            flush=True,
        )
        faults = [f"survived, line {m.line}: {name}" for name, m in survived.items() if name not in expected]
        names = {f"{module}.{m.name}" for m in found}
        faults += [f"listed, but killed: {name}" for name in sorted(expected & names - survived.keys())]
        faults += [f"listed, but there is no such mutant: {name}" for name in sorted(expected - names)]
        print(*(f"    {fault}" for fault in faults), sep="\n", end="\n" if faults else "", flush=True)
        wrong += faults
    print(f"{len(wrong)} faults, {time.monotonic() - begun:.0f} s")
    return 1 if wrong else 0


def equivalent(path: Path) -> dict[str, str]:
    """The listed mutants -> why each is equivalent. A reason is indented and holds for the names above it."""
    reasons, names = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            reasons |= {name: line.strip() for name in names}
            names = []
        else:
            names.append(line)
    if names:
        raise ValueError(f"{path}: no reason under {names}")
    return reasons


def _survivors(module: str, tree: ast.Module, found: list[Mutant], jobs: int) -> list[Mutant]:
    running, survived = {}, []
    for mutant in [*found, *[None] * jobs]:
        while len(running) >= jobs or (mutant is None and running):
            pid, status = os.wait()
            done = running.pop(pid)
            if status == 0:
                survived.append(done)
        if mutant is not None:
            running[_fork(module, tree, mutant)] = mutant
    return sorted(survived, key=found.index)


def _wait(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def _fork(module: str, tree: ast.Module, mutant: Mutant | None) -> int:
    """A child that runs the tests of `module` with the mutant applied; its status is pytest's."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 250
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        if not os.environ.get("MUTANTS_VERBOSE"):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        if mutant is not None:
            mutant.apply()
        sys.meta_path.insert(0, _Changed(f"{PACKAGE}.{module}", tree))
        import pytest

        gc.disable()
        names = (*TESTS.get(module, (f"test_{module}",)), LAST)
        files = [f"tests/algorithms/{name}.py" for name in names]
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--assert=plain"]
        status = int(pytest.main([*options, *files], plugins=[_EndAtOnce()]))
    finally:
        os._exit(status)


class _EndAtOnce:
    """The first failure decides, and the end of a session has nothing to clean up."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            os._exit(1)

    def pytest_sessionfinish(self, exitstatus):
        os._exit(int(exitstatus))


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module from a syntax tree instead of its file."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def get_source(self, name):
        return None

    def get_code(self, name):
        return compile(ast.fix_missing_locations(self.tree), f"{self.name} (changed)", "exec")


def _import_what_tests_need() -> None:
    """All that the tests import from elsewhere, names of lazy packages too; nothing of ours."""
    for path in (ROOT / "tests" / "algorithms").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in ("rlhf_exp", "tests"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    getattr(module, alias.name, None)
    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    torch.zeros(1, device="meta") + 1  # the first use imports more
    gc.collect()
    gc.freeze()  # a collection in a child would copy all of it


if __name__ == "__main__":
    sys.exit(main())
