"""When a trial of a sweep ends itself."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf


@dataclass
class EarlyStop:
    """What makes a trial hopeless; outside of a sweep nothing does. Nothing here is keyed: see sweeps/pruning.py."""

    rule: str = leaf(
        "none",
        doc="median: a trial ends whose best value so far is worse than the median of what the trials that are done "
        "had on average by this step (Golovin et al. 2017, section 3.2.1).",
        choices=("none", "median"),
        keyed=False,
    )
    metric: str | None = leaf(
        None,
        doc="What is compared, as metrics.jsonl calls it; null: the gold score, else the score, else the loss (the "
        "lower the better, as of all names that end in loss).",
        keyed=False,
    )
    grace: int = leaf(5, doc="Steps that every trial is given.", ge=0, keyed=False)
    trials: int = leaf(
        3, doc="Trials that have to be done before others are compared with them.", ge=1, keyed=False
    )
    guards: bool = leaf(
        False,
        doc="Whether a guard of ppo.guards that fires ends the trial, whatever its action.",
        keyed=False,
    )
