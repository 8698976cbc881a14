"""What a run was made with: config.yaml (the resolved config) and versions.json (code, packages, machine)."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_exp import __version__
from rlhf_exp.errors import InputError
from rlhf_exp.paths import PACKAGE
from rlhf_exp.store.runs import RunFolder

CONFIG = "config.yaml"
VERSIONS = "versions.json"
MASK = "***@"  # a password, in files
COMMIT = "commit.json"  # beside a package that a sweep has frozen: the git state of what it was copied from
PACKAGES = (
    *("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors", "numpy"),
    *("hydra-core", "omegaconf", "mlflow", "filelock", "vaderSentiment"),
)


def freeze(folder: RunFolder | str | Path, config: Any, argv: Sequence[str]) -> None:
    """Write config.yaml and versions.json. config: the stage's root dataclass; argv: without the program."""
    run = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    run.write_text(CONFIG, config_text(config, argv))
    run.write_text(VERSIONS, json.dumps(versions(argv), indent=1) + "\n")


def config_text(config: Any, argv: Sequence[str]) -> str:
    """The config as YAML in the schema's order, below the command that made it."""
    import yaml

    content = yaml.safe_dump(
        _masked(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=110
    )
    return f"# {_command(argv)}\n{content}"


def _command(argv: Sequence[str]) -> str:
    # a newline in an argument would end the comment line
    return without_password(shlex.join(["python", "-m", "rlhf_exp", *argv])).replace("\n", "\\n")


def without_password(text: str) -> str:
    """A tracking server's URI may carry a password, and run folders are shared."""
    return re.sub(r"(://[^/:@\s]*:)[^/@\s]+@", rf"\1{MASK}", text)


def with_password(uri: str, key: str, variable: str) -> str:
    """The URI as it was given, where a file has it without its password: from the environment. Raises InputError."""
    if MASK not in uri:
        return uri
    given = os.environ.get(variable, "")
    if without_password(given) != uri:
        raise InputError(f"{key}={uri}: passwords are not kept in files; set {variable} to the whole URI")
    return given


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _masked(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return without_password(value) if isinstance(value, str) else value


def versions(argv: Sequence[str]) -> dict[str, Any]:
    """Versions by installed metadata: nothing is imported for it. A package that is not installed is null."""
    return {
        "rlhf_exp": __version__,
        "git": git_state(PACKAGE),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "command": _command(argv),
        "argv": [without_password(argument) for argument in argv],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in `folder`; None if git is not there, fails or hangs."""
    try:
        # without GIT_DIR and the like, which a git hook sets
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


@cache
def git_state(package: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that `package` belongs to; None for an installed wheel.

    A wheel in a virtual environment may lie inside somebody else's repository: only a package that git tracks
    counts. dirty: the code or its configs (the package, conf/ and launchers/ beside it) differ from the
    commit.
    """
    if (package.parent / COMMIT).is_file():
        return json.loads((package.parent / COMMIT).read_text(encoding="utf-8"))
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    parts = [package, *(path for name in ("conf", "launchers") if (path := package.parent / name).is_dir())]
    changes = _git(package, "status", "--porcelain", "--", *map(str, parts))
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}
