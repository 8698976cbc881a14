"""The keys of hydra/sweeper=optuna. They are those of Hydra's own optuna plugin as far as that has them."""

# no `from __future__ import annotations`: Hydra runs this file before sys.modules has it, where dataclasses look
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class SamplerConf:
    """An optuna sampler: a class and its arguments; null leaves the class its own default."""

    _target_: str = MISSING
    seed: int | None = None  # null: drawn once, and kept in the study


@dataclass
class TPEConf(SamplerConf):
    """Tree-structured Parzen estimator (Bergstra et al. 2011); of several objectives MOTPE (Ozaki et al. 2022)."""

    _target_: str = "optuna.samplers.TPESampler"
    n_startup_trials: int = 10  # random ones before it
    n_ei_candidates: int = 24
    multivariate: bool = False
    constant_liar: bool = True  # keep away from what the same batch tries


@dataclass
class CMAESConf(SamplerConf):
    """CMA-ES (Hansen 2016) for numbers; choices are drawn at random. Needs two or more numbers."""

    _target_: str = "optuna.samplers.CmaEsSampler"
    x0: dict[str, Any] | None = None  # where it starts; null: the middle of the space
    sigma0: float | None = None  # null: a sixth of the space
    n_startup_trials: int = 1
    popsize: int | None = None
    warn_independent_sampling: bool = False


@dataclass
class RandomConf(SamplerConf):
    _target_: str = "optuna.samplers.RandomSampler"


@dataclass
class GridConf(SamplerConf):
    """Every combination once, in an order drawn from the seed."""

    _target_: str = "optuna.samplers.GridSampler"


@dataclass
class NSGAIIConf(SamplerConf):
    """NSGA-II (Deb et al. 2002), for several objectives."""

    _target_: str = "optuna.samplers.NSGAIISampler"
    population_size: int = 50
    mutation_prob: float | None = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5


@dataclass
class PrunerConf:
    """An optuna pruner: a class and its arguments."""

    _target_: str = "optuna.pruners.NopPruner"


@dataclass
class MedianConf(PrunerConf):
    """End a trial whose best value so far is worse than the median of the others at the same step."""

    _target_: str = "optuna.pruners.MedianPruner"
    n_startup_trials: int = 5  # trials that must have ended
    n_warmup_steps: int = 0
    interval_steps: int = 1
    n_min_trials: int = 1


@dataclass
class HalvingConf(PrunerConf):
    """Asynchronous successive halving (Li et al. 2018)."""

    _target_: str = "optuna.pruners.SuccessiveHalvingPruner"
    min_resource: Any = "auto"  # steps before the first rung
    reduction_factor: int = 4
    min_early_stopping_rate: int = 0
    bootstrap_count: int = 0


@dataclass
class OptunaConf:
    _target_: str = "hydra_plugins.rlhf_optuna.sweeper.OptunaSweeper"
    _recursive_: bool = False  # the sampler is made anew for each trial
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "none"}])
    sampler: SamplerConf = MISSING
    pruner: PrunerConf = MISSING

    # What is optimised: objective (what the stage reports), gold, kl, or the name of a metric of the run
    objectives: list[str] = field(default_factory=lambda: ["objective"])
    # maximize or minimize, one for each; null: losses and KL are minimised, all else is maximised
    direction: Any = None

    # Trials of the study in all: a sweep that is resumed runs what is left
    n_trials: int = 20
    # Trials asked for, and launched, at once; null: as many as the launcher runs at once
    n_jobs: int | None = None

    # The search space, as on the command line; there it wins
    params: dict[str, Any] | None = None
    # The same in the older form of Hydra's plugin: {key: {type, low, high, step, log, choices}}
    search_space: dict[str, Any] | None = None

    # URL of the database; null: study.db in the sweep's folder
    storage: str | None = None
    # null: the name of the sweep's folder
    study_name: str | None = None

    # Seconds between two looks at the running trials, if they may be pruned
    poll_seconds: float = 2.0


SAMPLERS = {
    "tpe": TPEConf,
    "motpe": TPEConf,
    "cmaes": CMAESConf,
    "random": RandomConf,
    "grid": GridConf,
    "nsgaii": NSGAIIConf,
}
PRUNERS = {"none": PrunerConf, "median": MedianConf, "halving": HalvingConf}


def register() -> None:
    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="rlhf_optuna")
    for group, options in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        for name, node in options.items():
            store.store(group=f"hydra/sweeper/{group}", name=name, node=node, provider="rlhf_optuna")


register()
