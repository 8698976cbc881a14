"""What a scorer gives to probes beside the real answers, as the plain content of probe.json.

    pairs, accuracy {share, low, high, n}, spread          of the real pairs
    length {answers {r, low, high, n}, pairs {..}}          correlation of score and length
    kinds {name: {n, above, share, low, high, shift, worst}}
    invariances {name: {n, flips, share, mean, largest}}
    real [{id, chosen, rejected, chosen_tokens, rejected_tokens}]

A scorer is any function of (prompt ids, answer ids) rows, so that nothing here knows of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_exp.algorithms.pairwise import wilson_interval
from rlhf_exp.errors import InputError
from rlhf_exp.probes.answers import Probe, Real

Rows = Sequence[tuple[list[int], list[int]]]  # ids of prompt and answer
Scorer = Callable[[Rows], list[float]]

WORST = 3  # examples kept of each kind


def measure(
    real: Sequence[Real],
    probes: Mapping[str, Sequence[Probe]],
    score: Scorer,
    again: Mapping[str, tuple[Sequence[Probe], Scorer]] | None = None,
) -> dict[str, Any]:
    """Score real answers and probes and compare them.

    again: invariance -> chosen answers once more, in a form that should score the same (other whitespace; the same
    ids in another batch), and what scores them. All but those are scored in one call. InputError for scores that are
    not finite: comparisons with nan are all false, as if nothing were ever preferred.
    """
    order = [(i, name) for i in range(len(real)) for name in ("chosen", "rejected")]
    rows = [(real[i].prompt, getattr(real[i], name)) for i, name in order]
    probed = sorted(
        ((probe, kind) for kind, found in probes.items() for probe in found), key=lambda pair: pair[0].row
    )
    rows += [(real[probe.row].prompt, probe.ids) for probe, _ in probed]
    scores = _finite(score(rows))
    chosen, rejected = scores[: 2 * len(real) : 2], scores[1 : 2 * len(real) : 2]
    found: dict[str, list[tuple[Probe, float]]] = {kind: [] for kind in probes}
    for (probe, kind), value in zip(probed, scores[2 * len(real) :], strict=True):
        found[kind].append((probe, value))
    return {
        "pairs": len(real),
        "accuracy": accuracy(chosen, rejected),
        "spread": spread(chosen),
        "length": lengths(real, chosen, rejected),
        "kinds": {kind: of_kind(real, chosen, values) for kind, values in found.items()},
        "invariances": {
            name: invariance(real, chosen, rejected, rows, scorer)
            for name, (rows, scorer) in (again or {}).items()
        },
        "real": [
            {
                "id": each.record.id,
                "chosen": c,
                "rejected": r,
                "chosen_tokens": len(each.chosen),
                "rejected_tokens": len(each.rejected),
            }
            for each, c, r in zip(real, chosen, rejected, strict=True)
        ],
    }


def accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
    """Share of pairs whose chosen answer scores higher, a tie is half right, with its 95 % Wilson interval."""
    return _share(sum(right(c, r) for c, r in zip(chosen, rejected, strict=True)), len(chosen))


def right(chosen: float, rejected: float) -> float:
    """1, 0, or 0.5 for a tie."""
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def of_kind(
    real: Sequence[Real], chosen: Sequence[float], scored: Sequence[tuple[Probe, float]]
) -> dict[str, Any]:
    """How many probes of a kind score above the real answer (a tie is not above), by how much, and the worst of them.

    shift: mean of probe minus real answer; in units of `spread` it compares between reward models.
    """
    shifts = [value - chosen[probe.row] for probe, value in scored]
    above = sum(shift > 0 for shift in shifts)
    worst = sorted(zip(shifts, scored, strict=True), key=lambda pair: -pair[0])[:WORST]
    return _share(above, len(scored)) | {
        "above": above,
        "shift": _mean(shifts),
        "worst": [
            {
                "id": real[probe.row].record.id,
                "prompt": str(real[probe.row].record.prompt),
                "chosen": real[probe.row].record.chosen,
                "text": probe.text,
                "chosen_score": chosen[probe.row],
                "score": value,
            }
            for _, (probe, value) in worst
        ],
    }


def invariance(
    real: Sequence[Real],
    chosen: Sequence[float],
    rejected: Sequence[float],
    again: Sequence[Probe],
    score: Scorer,
) -> dict[str, Any]:
    """Differences that should be 0, and the share of pairs that they order the other way."""
    scores = _finite(score([(real[probe.row].prompt, probe.ids) for probe in again]))
    off = [abs(value - chosen[probe.row]) for probe, value in zip(again, scores, strict=True)]
    flips = sum(
        right(value, rejected[probe.row]) != right(chosen[probe.row], rejected[probe.row])
        for probe, value in zip(again, scores, strict=True)
    )
    return _share(flips, len(again)) | {
        "flips": flips,
        "mean": _mean(off),
        "largest": max(off, default=None),
    }


def lengths(real: Sequence[Real], chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """Correlation of score and length in tokens: over all real answers, and of the differences within pairs."""
    sizes = [len(each.chosen) for each in real], [len(each.rejected) for each in real]
    more = [c - r for c, r in zip(*sizes, strict=True)]
    better = [c - r for c, r in zip(chosen, rejected, strict=True)]
    return {
        "answers": correlation([*sizes[0], *sizes[1]], [*chosen, *rejected]),
        "pairs": correlation(more, better),
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Pearson's r with its 95 % interval by Fisher's z (1921); None where it is not defined."""
    n = len(x)
    if n and (min(x) == max(x) or min(y) == max(y)):  # exactly: the mean of equal numbers is rounded
        return {"r": None, "low": None, "high": None, "n": n}
    dx, dy = ([value - _mean(values) for value in values] for values in (x, y))
    power = math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy)) if n else 0
    if not power:
        return {"r": None, "low": None, "high": None, "n": n}
    r = max(-1.0, min(1.0, sum(a * b for a, b in zip(dx, dy, strict=True)) / power))
    if n < 4 or abs(r) == 1:
        return {"r": r, "low": None, "high": None, "n": n}
    half = 1.959963984540054 / math.sqrt(n - 3)
    return {"r": r, "low": math.tanh(math.atanh(r) - half), "high": math.tanh(math.atanh(r) + half), "n": n}


def spread(scores: Sequence[float]) -> float | None:
    """Standard deviation (n - 1) of the real answers' scores: the unit that a shift is large or small in.

    Exactly 0 where all are the same, which a rounded mean would hide.
    """
    if len(scores) < 2:
        return None
    if min(scores) == max(scores):
        return 0.0
    return math.sqrt(sum((score - _mean(scores)) ** 2 for score in scores) / (len(scores) - 1))


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Flat names for a tracker; what is not defined is left out."""
    found = {f"probe/{name}": part["share"] for name, part in report["kinds"].items()}
    found |= {f"probe/{name}": part["share"] for name, part in report["invariances"].items()}
    found |= {f"probe/shift/{name}": part["shift"] for name, part in report["kinds"].items()}
    found |= {f"probe/length_{name}": part["r"] for name, part in report["length"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _finite(scores: list[float]) -> list[float]:
    wrong = sum(not math.isfinite(score) for score in scores)
    if wrong:
        raise InputError(
            f"the reward model's scores hold nan or inf ({wrong} of {len(scores)} probed answers): give another "
            "adapters.reward, or train it with a lower optim.lr; if its weights are sound, set model.dtype=float32"
        )
    return scores


def _share(count: float, n: int) -> dict[str, Any]:
    if not n:
        return {"n": 0, "share": None, "low": None, "high": None}
    return {"n": n, "share": count / n, **wilson_interval(count, n)._asdict()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
