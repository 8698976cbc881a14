"""How good a reward model's preferences are: accuracy, calibration and margins, over all pairs and by source.

{"pairs": n, "accuracy": .., "accuracy_low": .., "accuracy_high": .., "length_accuracy": .., "loss": ..,
 "margin": {"mean": .., "std": .., "edges": [..], "counts": [..]},
 "calibration": {"ece": .., "bins": [{"low": .., "high": .., "pairs": .., "confidence": .., "accuracy": ..}, ..]},
 "sources": [{"source": .., "pairs": .., "accuracy": .., "accuracy_low": .., "accuracy_high": ..,
              "length_accuracy": ..}, ..]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_exp.algorithms.pairwise import pairwise_loss
from rlhf_exp.data.load import longer_chosen
from rlhf_exp.data.records import Comparison
from rlhf_exp.evaluation.share import share_of

CALIBRATION_BINS = 10  # of equal width from 0.5 to 1
MARGIN_BINS = 24  # an even number: one begins at 0
MOST_SOURCES = 20  # those with most pairs

Scores = Sequence[tuple[float, float]]  # of chosen and rejected


def assess(rows: Sequence[Comparison], scores: Scores) -> dict[str, Any]:
    """Everything about the pairs, which may not be none; `rows` and their scores in one order."""
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).unbind(dim=1)
    margins = (chosen - rejected).numpy()
    return {
        "pairs": len(rows),
        **_accuracies(rows, scores),
        "loss": float(pairwise_loss(chosen, rejected)),
        "margin": histogram(margins),
        "calibration": calibration(margins),
        "sources": by_source(rows, scores),
    }


def _accuracies(rows: Sequence[Comparison], scores: Scores) -> dict[str, float]:
    """With the 95 % interval, which knows that pairs of one prompt are not independent; and the accuracy of the rule
    "the longer answer wins" on the same pairs. A tie is half right.
    """
    margins = np.array([chosen - rejected for chosen, rejected in scores])
    accuracy, low, high = share_of((0.5 + 0.5 * np.sign(margins)).tolist(), [row.id for row in rows])
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_accuracy": longer_chosen(rows),
    }


def calibration(margins: np.ndarray, bins: int = CALIBRATION_BINS) -> dict[str, Any]:
    """Whether preferences are as often right as they are sure (Guo et al. 2017, eq. 3).

    A pair's confidence is sigmoid(|margin|), the probability that Bradley-Terry gives to the answer that scores
    higher; it is right where that is the chosen one, half right in a tie. `bins` of equal width from 0.5 to 1, each
    with its upper bound and without its lower one (the first with both). ece = sum over the bins of n_b / n |accuracy
    - confidence|. Empty bins have neither.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = (margins > 0) + 0.5 * (margins == 0)
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found, ece = [], 0.0
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        entry: dict[str, Any] = {"low": float(edges[i]), "high": float(edges[i + 1]), "pairs": count}
        if count:
            sure, share = float(confidence[inside].mean()), float(right[inside].mean())
            entry |= {"confidence": sure, "accuracy": share}
            ece += count / len(margins) * abs(share - sure)
        found.append(entry)
    return {"ece": ece, "bins": found}


def histogram(margins: np.ndarray, bins: int = MARGIN_BINS) -> dict[str, Any]:
    """Score of chosen minus rejected: mean, standard deviation, and counts in bins as wide on both sides of 0."""
    reach = float(np.abs(margins).max()) or 1.0
    counts, edges = np.histogram(margins, bins=bins, range=(-reach, reach))
    return {
        "mean": float(margins.mean()),
        "std": float(margins.std()),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def by_source(rows: Sequence[Comparison], scores: Scores) -> list[dict[str, Any]]:
    """Of each source that the data names, those of most pairs first; [] where it names none."""
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.source:
            places.setdefault(row.source, []).append(i)
    ordered = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {
            "source": source,
            "pairs": len(own),
            **_accuracies([rows[i] for i in own], [scores[i] for i in own]),
        }
        for source, own in ordered[:MOST_SOURCES]
    ]


def metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Flat names for a tracker."""
    flat = {
        f"validation/{name}": float(found[name])
        for name in ("accuracy", "accuracy_low", "accuracy_high", "length_accuracy", "loss", "pairs")
    }
    flat["validation/margin"] = found["margin"]["mean"]
    flat["validation/margin_std"] = found["margin"]["std"]
    flat["validation/ece"] = found["calibration"]["ece"]
    for each in found["sources"]:
        name = re.sub(r"[^\w.\- ]+", "-", each["source"])[:60]  # what MLflow takes
        flat[f"validation/source/{name}/accuracy"] = each["accuracy"]
    return flat
