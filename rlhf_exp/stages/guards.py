"""When a PPO run goes wrong: rules over the metrics of its iterations. What follows is in actions.py.

    collapse   answers empty, short, endless or all alike; hardly any entropy left; far from the reference
    hacking    the score that is trained on rises while one that is not falls (Gao et al. 2022, figure 1)
    nan        nan or inf in logits, losses or gradients

Nothing here knows of models. The metrics of iteration t are of answers that were written before its update, so those
of t + 1 say how good the adapter is that was kept after t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from rlhf_exp import schema
from rlhf_exp.errors import InputError
from rlhf_exp.fields import did_you_mean
from rlhf_exp.schema import PPO
from rlhf_exp.schema.names import GOLD_METRIC

SCORES, GOLD, KL = "objective/scores", GOLD_METRIC, "objective/kl"
LENGTH = "response/length_mean"
REPORTED = (SCORES, GOLD, KL, LENGTH)  # of the last sound iteration, for run.json
BROKEN = "policy/nonfinite"  # minibatches whose gradients held nan or inf, and rollouts whose logits did
NAN, HACKING = "nan", "hacking"
# what a sound iteration has as a number; others may be nan for good reasons (distinct-2 of one-token answers)
SOUND = (SCORES, KL, "objective/rewards", "objective/entropy", "policy/loss", "policy/approxkl")
SOUND += ("policy/ratio_mean", "policy/grad_norm", "critic/loss", "critic/grad_norm", "ptx/loss")
AUTO = "auto"  # of ppo.best_metric


class Bound(NamedTuple):
    """A metric that must not be above (or below) a leaf of `ppo.guards`, which is called as the guard is."""

    guard: str
    metric: str
    leaf: str
    above: bool
    began: bool = False  # whether a run whose first iteration was past the bound already is left alone
    what: str = ""


BOUNDS = (
    Bound("empty", "response/empty_rate", "empty_rate", True, what="share of empty answers"),
    Bound("length", LENGTH, "length_floor", False, what="mean length"),
    Bound("eos", "response/eos_rate", "eos_rate", False, True, "share of answers that end"),
    Bound("distinct_2", "response/distinct_2", "distinct_2", False, True, "distinct-2"),
    Bound("repetition", "response/repetition", "repetition", True, what="share of repeated 4-grams"),
    Bound("entropy", "objective/entropy", "entropy", False, True, "entropy, nats a token,"),
    Bound("kl", KL, "kl", True, what="KL to the reference, nats an answer,"),
    Bound("clipfrac", "policy/clipfrac", "clipfrac", True, what="share of clipped ratios"),
)


@dataclass(frozen=True)
class Fired:
    """A guard that fired: what it saw, what it allows, and which action is asked for."""

    guard: str
    metric: str
    value: float
    bound: float
    action: str
    says: str


@dataclass
class Guards:
    """What the rules remember. Plain numbers, so that a checkpoint holds them bit for bit."""

    first: dict[str, float] = field(default_factory=dict)  # figures of the first iteration
    lengths: list[float] = field(default_factory=list)  # mean lengths of the first iterations
    scores: list[float] = field(default_factory=list)  # of the latest iterations
    golds: list[float] = field(default_factory=list)
    silent: dict[str, int] = field(default_factory=dict)  # guard -> last iteration in which it says nothing
    kept: dict[int, float] = field(default_factory=dict)  # step of a kept adapter -> its worth; 0: the start
    worth: float | None = None  # of the policy as it is now, as far as it was measured
    recoveries: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)  # of guards.jsonl
    last: dict[str, float] = field(default_factory=dict)  # REPORTED
    step: int = 0
    stopped: str | None = None  # why the run ends here

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self) | {"kept": [[step, worth] for step, worth in self.kept.items()]}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Guards:
        """What `to_dict` gave, bit for bit."""
        return cls(**{**found, "kept": {int(step): worth for step, worth in found["kept"]}})

    def watch(self, ppo: PPO, step: int, metrics: Mapping[str, float]) -> list[Fired]:
        """What fires after iteration `step`. Raises InputError where `ppo.best_metric` is no metric of it."""
        self.step = step
        if wrong := broken(metrics):
            return [self._nan(ppo.guards, wrong, metrics)]
        self._remember(ppo, step, metrics)
        found = [
            *(fired for bound in BOUNDS if (fired := self._past(ppo.guards, bound, metrics))),
            *self._shrunken(ppo.guards, metrics),
            *self._hacking(ppo.guards),
        ]
        # length has two bounds; one of them is enough
        loud = {fired.guard: fired for fired in reversed(found) if step > self.silent.get(fired.guard, 0)}
        self.silent |= dict.fromkeys(loud, step + ppo.guards.patience)
        return list(loud.values())[::-1]

    def best(self) -> int | None:
        """The step of the kept adapter that is worth most, the earliest of equals; None: nothing is measured."""
        return max(self.kept, key=lambda step: (self.kept[step], -step), default=None)

    def returned(self, step: int) -> None:
        """The policy is again what was kept after `step`: trends begin anew."""
        self.worth = self.kept.get(step)
        self.scores, self.golds = [], []

    def _remember(self, ppo: PPO, step: int, metrics: Mapping[str, float]) -> None:
        self.last = {name: metrics[name] for name in REPORTED if name in metrics}
        if not self.first:
            self.first = {
                b.metric: metrics[b.metric] for b in BOUNDS if finite(metrics.get(b.metric)) is not None
            }
        if len(self.lengths) < ppo.guards.baseline and LENGTH in metrics:
            self.lengths.append(metrics[LENGTH])
        self.worth = worth(ppo, metrics)
        before = step - 1
        if self.worth is not None and before % ppo.save_every == 0:
            self.kept[before] = self.worth
        if (gold := finite(metrics.get(GOLD))) is not None and ppo.guards.hacking_window:
            self.scores = [*self.scores, metrics[SCORES]][-ppo.guards.hacking_window :]
            self.golds = [*self.golds, gold][-ppo.guards.hacking_window :]

    def _nan(self, guards: schema.Guards, wrong: Sequence[str], metrics: Mapping[str, float]) -> Fired:
        says = f"nan or inf in {', '.join(wrong)}"
        value = float(metrics.get(wrong[0], math.nan))
        return Fired(NAN, wrong[0], value, 0.0, "recover", says)

    def _past(self, guards: schema.Guards, bound: Bound, metrics: Mapping[str, float]) -> Fired | None:
        limit, value = getattr(guards, bound.leaf), finite(metrics.get(bound.metric))
        if not limit or value is None or not past(bound, value, limit):
            return None
        if bound.began and past(bound, self.first.get(bound.metric, value), limit):
            return None
        side = "above" if bound.above else "below"
        says = f"{bound.what} {value:.3g} is {side} ppo.guards.{bound.leaf}={limit:g}"
        return Fired(bound.guard, bound.metric, value, limit, action_of(guards, bound.guard), says)

    def _shrunken(self, guards: schema.Guards, metrics: Mapping[str, float]) -> list[Fired]:
        if not guards.length_share or len(self.lengths) < guards.baseline:
            return []
        mean, value = sum(self.lengths) / len(self.lengths), metrics[LENGTH]
        limit = guards.length_share * mean
        if not value < limit:
            return []
        says = (
            f"mean length {value:.3g} is below ppo.guards.length_share={guards.length_share:g} of the first "
            f"{len(self.lengths)} iterations' {mean:.3g}"
        )
        return [Fired("length", LENGTH, value, limit, guards.length_action, says)]

    def _hacking(self, guards: schema.Guards) -> list[Fired]:
        window = guards.hacking_window
        if not window or len(self.golds) < window:
            return []
        up, down = trend(self.scores), trend(self.golds)
        if not (up >= guards.hacking_z and down <= -guards.hacking_z):
            return []
        says = (
            f"over the last {window} iterations the score rose ({self.scores[0]:.3g} to {self.scores[-1]:.3g}, "
            f"z {up:.1f}) while gold fell ({self.golds[0]:.3g} to {self.golds[-1]:.3g}, z {down:.1f})"
        )
        return [Fired(HACKING, GOLD, down, -guards.hacking_z, guards.hacking_action, says)]


def finite(value: object) -> float | None:
    """A number that is one."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def past(bound: Bound, value: float, limit: float) -> bool:
    return value > limit if bound.above else value < limit


def action_of(guards: schema.Guards, guard: str) -> str:
    """The action that the config asks for when `guard` fires."""
    return getattr(guards, f"{guard}_action")


def broken(metrics: Mapping[str, float]) -> list[str]:
    """The metrics that say that something is not finite; none in a sound iteration."""
    wrong = [name for name in SOUND if name in metrics and finite(metrics[name]) is None]
    return wrong + [BROKEN] * bool(metrics.get(BROKEN))


def worth(ppo: PPO, metrics: Mapping[str, float]) -> float | None:
    """What `ppo.best_metric` says of an iteration; None where it is no number."""
    if ppo.best_metric != AUTO:
        if ppo.best_metric not in metrics:
            raise InputError(
                f"ppo.best_metric={ppo.best_metric} is no metric of an iteration"
                + (did_you_mean(ppo.best_metric, metrics) or f"; there are {', '.join(sorted(metrics))}")
            )
        return finite(metrics[ppo.best_metric])
    if GOLD in metrics:
        return finite(metrics[GOLD])
    return finite(metrics[SCORES] - ppo.kl_coef * metrics[KL])


def worth_name(ppo: PPO, gold: bool) -> str:
    """What `worth` is, in words."""
    if ppo.best_metric != AUTO:
        return ppo.best_metric
    return GOLD if gold else f"{SCORES} - {ppo.kl_coef:g} * {KL}"


def trend(values: Sequence[float]) -> float:
    """How clearly a series rises (below 0: falls): Kendall's S over its standard deviation (Mann 1945, Kendall 1975).

    S = sum over i < j of sign(x_j - x_i), variance n (n - 1) (2 n + 5) / 18 without a trend, one taken off |S| for
    continuity. Only the order counts: no outlier and no scale matters. Ties make it smaller.
    """
    n = len(values)
    s = sum((values[j] > values[i]) - (values[j] < values[i]) for i in range(n) for j in range(i + 1, n))
    return math.copysign(max(0, abs(s) - 1), s) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
