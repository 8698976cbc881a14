"""Passwords in URIs stay out of a sweep's folder, which others read.

The command, the trials' overrides and configs, and what Hydra and optuna write of them, are in many files and logs.
All of them get the URI without its password, as a run's config.yaml does. The whole one is handed down in the
environment, which child processes inherit, and jobs of SLURM too; to resume from another shell it has to be set
there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from omegaconf import OmegaConf, read_write

from rlhf_exp.store.frozen import without_password
from rlhf_exp.sweeps.plan import Plan
from rlhf_exp.tracking.location import VARIABLE

STORAGE = "OPTUNA_STORAGE"
VARIABLES = {"tracking.uri": VARIABLE, "hydra.sweeper.storage": STORAGE}


def kept_out(plan: Plan, argv: Sequence[str]) -> tuple[Plan, list[str]]:
    """The plan and the command without passwords; these are in the environment from here on."""
    lines, words, config = list(plan.overrides), list(argv), plan.config.copy()
    for key, variable in VARIABLES.items():
        uri = OmegaConf.select(plan.config, key)
        if not uri or without_password(uri) == uri:
            continue
        os.environ[variable] = uri
        masked = without_password(uri)
        section, _, name = key.rpartition(".")
        with read_write(OmegaConf.select(config, section)) as node:
            node[name] = masked
        lines = [line for line in lines if line.lstrip("+").partition("=")[0] != key] + [f"{key}='{masked}'"]
        words = [without_password(word) for word in words]
    return replace(plan, overrides=lines, config=config), words
