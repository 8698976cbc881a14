"""Going on with a sweep: the same command on the same folder, on its frozen code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_exp.paths import conf_dir
from rlhf_exp.sweeps import folder, ledger, trial

SWEEP_DIR = "hydra.sweep.dir"
FLAGS = ("-cd", "--config-dir")


def go_on(path: Path, stopped: bool = False, new_code: bool = False) -> int:
    """Become the process that goes on; does not return. stopped, new_code: as the flags of the command."""
    if new_code:
        folder.freeze(folder.code(path), conf_dir(), folder.config_dir(path))
    if stopped:
        for number, state in ledger.states(path).items():
            if state.status == ledger.STOPPED:
                trial.without_early_stop(path / str(number))
                reason = "to be run to its end"
                ledger.append(path, ledger.ENDED, number=number, status=ledger.INTERRUPTED, reason=reason)
    become(path, folder.read(path)["argv"])
    return 0


def become(path: Path, argv: Sequence[str]) -> None:
    """This process runs the command of the sweep on its frozen code; does not return."""
    words = without_place(argv)
    if (frozen := folder.config_dir(path)) is not None:
        words = _replaced(words, str(frozen))
    sys.stdout.flush()
    command = [*folder.python(), "-m", "rlhf_exp", *words, place(path)]
    os.execve(command[0], command, folder.environment(path))


def _replaced(words: Sequence[str], config_dir: str) -> list[str]:
    """The command with another --config-dir."""
    found = list(words)
    for i, word in enumerate(found):
        if word in FLAGS:
            found[i + 1] = config_dir
        elif word.startswith(tuple(f"{flag}=" for flag in FLAGS)):
            found[i] = f"{word.partition('=')[0]}={config_dir}"
    return found


def without_place(lines: Sequence[str]) -> list[str]:
    """Without the sweep's folder, which is added where it is needed."""
    return [line for line in lines if not line.lstrip("+").startswith(f"{SWEEP_DIR}=")]


def place(path: Path) -> str:
    """The sweep's folder as an override; a path in quotes of Hydra's grammar."""
    escaped = str(path).replace("'", "\\'")
    return f"{SWEEP_DIR}='{escaped}'"
