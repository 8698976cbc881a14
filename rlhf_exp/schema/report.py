"""report=: what stage=report compares and draws."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf


@dataclass
class Report:
    """Scores against KL of every trial and checkpoint (docs/report.md)."""

    kl: str = leaf(
        "kl",
        doc="The x-axis: a metric of eval.json; of training curves objective/kl_untruncated, else objective/kl.",
    )
    objectives: list[str] = leaf(
        ["gold", "reward", "win_rate"],
        doc="The y-axes, the first is the one that decides: metrics of eval.json; of training curves reward is "
        "objective/scores, gold objective/gold, any other the metric of that name. Higher is better.",
    )
    kl_limits: list[float] = leaf(
        [1.0, 2.0, 5.0, 10.0, 20.0], doc="Best policy under a KL of at most each of these, in nats an answer."
    )
    fit: str = leaf(
        "rl",
        doc="Over-optimisation law (Gao et al. 2022, d = sqrt(KL)): rl, d (alpha - beta log d); bon, "
        "d (alpha - beta d).",
        choices=("rl", "bon", "none"),
    )
    band: str = leaf(
        "range",
        doc="Around the mean of runs that differ only by seed: range, lowest to highest; se, one standard error.",
        choices=("range", "se"),
    )
    points: int = leaf(
        25, doc="At most this many points of a training curve: means of steps that follow one another.", ge=2
    )
    samples: int = leaf(20, doc="Prompts whose answers can be paged through, at most; 0: none.", ge=0)
