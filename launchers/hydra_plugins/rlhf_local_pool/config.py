"""The keys of hydra/launcher=local_pool."""

# no `from __future__ import annotations`: Hydra runs this file before sys.modules has it, where dataclasses look
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore


@dataclass
class LocalPoolConf:
    _target_: str = "hydra_plugins.rlhf_local_pool.launcher.LocalPool"

    # Trials at a time; null: as many as there are shares of CUDA devices, without any: cores // threads
    workers: int | None = None
    # CUDA devices of each trial
    devices_per_trial: int = 1
    # Which ones, such as [0, 2]; null: all that CUDA_VISIBLE_DEVICES shows; []: none
    devices: list[str] | None = None
    # CPU threads of each trial; null: the run's `threads`, and if that is 0 an equal share of the cores
    threads: int | None = None
    # Variables for the trials' processes
    env: dict[str, str] = field(default_factory=dict)
    # Seconds that a trial has to save itself when the sweep is stopped; then it is killed
    grace_seconds: float = 600.0


ConfigStore.instance().store(
    group="hydra/launcher", name="local_pool", node=LocalPoolConf, provider="rlhf_local_pool"
)
