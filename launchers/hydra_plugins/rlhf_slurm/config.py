"""The keys of `hydra/launcher=slurm`; what each means is in rlhf_exp/jobs/settings.py and docs/slurm.md.

No `from __future__ import annotations`: Hydra's scanner executes a module without entering it in sys.modules, where a
dataclass would look its annotations up.
"""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from rlhf_exp.jobs.settings import Settings


@dataclass
class SlurmConf(Settings):
    _target_: str = "hydra_plugins.rlhf_slurm.launcher.SlurmLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmConf, provider="rlhf_exp")
