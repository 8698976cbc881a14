"""Where things are on this machine: the cache and the config tree."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_exp.errors import InputError

PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """For what can be made again: RLHF_EXP_CACHE, else ~/.cache/rlhf_exp. It may not exist yet."""
    chosen = os.environ.get("RLHF_EXP_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "rlhf_exp"


def conf_dir() -> Path:
    """The Hydra tree: inside the package (installed wheel), else beside the package (checkout).

    Raises InputError when neither place holds a config.yaml.
    """
    places = (PACKAGE / "conf", PACKAGE.parent / "conf")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise InputError(
        f"no config tree: looked for config.yaml in {places[0]} and {places[1]}; reinstall the package"
    )
