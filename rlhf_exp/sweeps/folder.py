"""The folder of a sweep (hydra.sweep.dir): who it is, and the code that its trials run on, frozen at submission.

sweep.json    argv, cwd, created, sweeper, launcher, MLflow run, commit
code/         rlhf_exp/, conf/, launchers/, config_dir/ as they were: a later edit changes no waiting trial
ledger.jsonl  what became of each trial
0/ 1/ ...     the trials: trial.yaml, runs.txt, values.jsonl
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp import __version__
from rlhf_exp.errors import InputError
from rlhf_exp.paths import PACKAGE
from rlhf_exp.store import atomic
from rlhf_exp.store.frozen import COMMIT, git_state
from rlhf_exp.store.runs import now

SWEEP, CODE, CONF, CONFIG_DIR = "sweep.json", "code", "conf", "config_dir"
NEEDED = ("argv", "cwd", "created", "version")  # in sweep.json
LAUNCHERS, PLUGINS = "launchers", "hydra_plugins"
OURS = "rlhf_*"  # plugins of this package, in the wheel's hydra_plugins


def is_sweep(path: Path) -> bool:
    return (Path(path) / SWEEP).is_file()


def create(
    path: Path,
    argv: Sequence[str],
    *,
    conf: Path,
    config_dir: str | Path | None = None,
    sweeper: str = "basic",
    launcher: str = "basic",
) -> dict[str, Any]:
    """Make the folder of a new sweep, with the code, `conf` and `config_dir` as they are now; returns sweep.json.

    argv: the command without `python -m rlhf_exp`.
    """
    path.mkdir(parents=True, exist_ok=True)
    freeze(path / CODE, conf, config_dir)
    content = {
        "argv": list(argv),
        "cwd": os.getcwd(),
        "created": now(),
        "sweeper": sweeper,
        "launcher": launcher,
        "mlflow_run_id": None,
        "version": __version__,
        **{name: (git_state(PACKAGE) or {}).get(name) for name in ("commit", "dirty")},
    }
    _write(path, content)
    return content


def read(path: Path) -> dict[str, Any]:
    """sweep.json. InputError where the folder is no sweep's, or the file cannot be read."""
    file = Path(path) / SWEEP
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path} is no sweep's folder: it has no {SWEEP}; sweeps are in multirun/results"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from error
    if not isinstance(content, dict) or (missing := [name for name in NEEDED if name not in content]):
        what = f"has no {', '.join(missing)}" if isinstance(content, dict) else "is no JSON object"
        raise InputError(f"{file} {what}: no sweep has written it")
    return content


def started_in(path: Path) -> Path:
    """The folder in which the sweep was started, which relative paths are from. InputError if it is gone."""
    cwd = Path(read(path)["cwd"])
    if not cwd.is_dir():
        raise InputError(
            f"{path} was started in {cwd}, which is gone: relative paths of its trials are from there"
        )
    return cwd


def update(path: Path, **fields: Any) -> dict[str, Any]:
    """Set fields of sweep.json and leave the others."""
    content = read(path) | fields
    _write(path, content)
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    atomic.write_bytes(
        Path(path) / SWEEP, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    )


def trials(path: Path) -> list[Path]:
    """The folders of the trials, by number."""
    found = [p for p in Path(path).iterdir() if p.name.isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name))


def code(path: Path) -> Path:
    return Path(path) / CODE


def config_dir(path: Path) -> Path | None:
    """The frozen copy of what --config-dir named."""
    place = code(path) / CONFIG_DIR
    return place if place.is_dir() else None


def conf(path: Path) -> Path:
    """The frozen config tree: beside the package as in a checkout, whatever it was copied from."""
    return code(path) / CONF


def freeze(target: Path, conf: Path, config_dir: str | Path | None = None) -> None:
    """Copy the package, the tree `conf`, our launchers and `config_dir` to `target`, whole or not at all."""
    beside = PACKAGE.parent
    plugins = [beside / LAUNCHERS / PLUGINS, beside / PLUGINS]  # of a checkout, of an installed wheel
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _copy(PACKAGE, new / PACKAGE.name, without=(CONF,))
        _copy(conf, new / CONF)
        for plugin in _ours(plugins):
            _copy(plugin, new / LAUNCHERS / PLUGINS / plugin.name)
        if config_dir is not None:
            _copy_configs(Path(config_dir), new / CONFIG_DIR)
        (new / COMMIT).write_text(json.dumps(git_state(PACKAGE)) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _ours(folders: Iterable[Path]) -> list[Path]:
    """The plugins in the first of these folders that has any."""
    for folder in folders:
        if found := sorted(path for path in folder.glob(OURS) if path.is_dir()):
            return found
    return []


def _copy(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", *without))


def _copy_configs(source: Path, target: Path) -> None:
    """The YAML files alone: the folder may be the working directory, with everything in it.

    Left out is what sweeps have frozen, this one and others.
    """
    source, sweep = source.absolute(), target.absolute().parents[1]
    target.mkdir(parents=True)
    for file in [*source.rglob("*.yaml")]:
        above = file.parents[: len(file.relative_to(source).parts) - 1]
        if not any(folder == sweep or is_sweep(folder) for folder in above):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def environment(path: Path, given: dict[str, str] | None = None) -> dict[str, str]:
    """The variables with which a process runs on the sweep's frozen code; given: os.environ.

    PYTHONSAFEPATH because `python -m` would look into the working directory first, which may be the checkout; a
    user's own modules are still found there, last.
    """
    given = dict(os.environ if given is None else given)
    frozen = Path(path).absolute() / CODE
    places = [str(frozen), str(frozen / LAUNCHERS)]
    places += [place for place in given.get("PYTHONPATH", "").split(os.pathsep) if place not in ("", *places)]
    return given | {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}


def python() -> list[str]:
    """This interpreter, as a command's beginning."""
    return [sys.executable, "-P"]
