"""A trial as a file, trial.yaml in its folder: its overrides and the whole composed config, in plain YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.store import atomic
from rlhf_exp.sweeps import ledger

TRIAL = "trial.yaml"


def write(path: Path, number: int, overrides: Sequence[str], config: Any, choices: Mapping[str, str]) -> Path:
    """Freeze a trial in its folder, sweep/NUMBER, and enter it in the ledger; returns the folder.

    config: the composed config (OmegaConf, Hydra's node is left out), a run's dataclass, or plain dicts. A trial that
    is there already stays as it is: InputError if it is another one (`resume` makes none). Where the ledger has lost
    it, it is entered again.
    """
    path, overrides = Path(path), without_hydra(overrides)
    if (path / TRIAL).is_file():
        known = read(path)["overrides"]
        if _without_resume(known) != _without_resume(overrides):
            raise InputError(
                f"{path.parent} has another trial {number}: {' '.join(known)}, not {' '.join(overrides)}; choose "
                "another hydra.sweep.dir"
            )
        state = ledger.states(path.parent).get(number)
        if state is None or state.overrides != known:
            ledger.append(path.parent, ledger.TRIAL, number=number, overrides=known)
        return path
    import yaml

    content = {
        "number": number,
        "overrides": overrides,
        "cwd": os.getcwd(),
        "choices": dict(choices),
        "config": _plain(config),
    }
    path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    atomic.write_bytes(path / TRIAL, text.encode())
    ledger.append(path.parent, ledger.TRIAL, number=number, overrides=overrides)
    return path


def without_hydra(overrides: Sequence[str]) -> list[str]:
    """The overrides that are the trial's, not Hydra's own."""
    return [str(line) for line in overrides if not str(line).lstrip("+~").startswith(("hydra.", "hydra/"))]


def _without_resume(overrides: Sequence[str]) -> list[str]:
    """It says how a command goes on, not what is trained."""
    return [line for line in overrides if line.lstrip("+~").partition("=")[0] != "resume"]


def _plain(config: Any) -> dict[str, Any]:
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    from omegaconf import OmegaConf

    if OmegaConf.is_config(config):
        from rlhf_exp import compose

        return OmegaConf.to_container(compose.without_hydra(config), resolve=True, enum_to_str=True)
    return dict(config)


def read(path: Path) -> dict[str, Any]:
    """trial.yaml. InputError where there is none."""
    import yaml

    try:
        return yaml.safe_load((Path(path) / TRIAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is no trial's folder: it has no {TRIAL}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{Path(path) / TRIAL} cannot be read ({error})") from error


def without_early_stop(path: Path) -> None:
    """Let a trial that was stopped early go to its end when it is run again."""
    import yaml

    content = read(path)
    if early := content["config"].get("early_stop"):
        early.update(rule="none", guards=False)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    atomic.write_bytes(Path(path) / TRIAL, text.encode())


def config_of(content: Mapping[str, Any]) -> Any:
    """The run's dataclass, checked. Raises InputError with every problem."""
    from omegaconf import OmegaConf

    from rlhf_exp import compose, schema

    values = content["config"]
    with compose.explained():
        merged = OmegaConf.merge(OmegaConf.structured(schema.RUNS[values["stage"]]), values)
    return compose.to_run(merged)
