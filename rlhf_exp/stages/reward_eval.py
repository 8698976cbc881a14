"""The end of the reward stage: how good the model's preferences are, as figures, pairs to read, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlhf_exp.data.records import Comparison
from rlhf_exp.evaluation import preference
from rlhf_exp.evaluation.preference_figures import panels
from rlhf_exp.evaluation.render import WIDE, write_png
from rlhf_exp.stages.context import EVALUATION, MARGINS, Context
from rlhf_exp.store.runs import plain

REPORT = "evaluation.json"


def publish(
    context: Context, rows: Sequence[Comparison], scores: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Write evaluation/evaluation.json and evaluation/margins.png; returns the metrics.

    scores: of chosen and rejected, of at least one validation pair.
    """
    found = preference.assess(rows, scores)
    with context.folder.publish(EVALUATION) as folder:
        text = json.dumps(plain(found), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        write_png(folder / MARGINS, panels(found), 2, WIDE)
    context.tracker.artifact(context.folder.path / EVALUATION, EVALUATION)
    for line in lines(found):
        print(line, flush=True)
    return preference.metrics(found)


def lines(found: dict[str, Any]) -> list[str]:
    """The accuracy by source, where the data names any."""
    return [
        f"  {each['source']}: accuracy {each['accuracy']:.3f} ({each['accuracy_low']:.3f} to "
        f"{each['accuracy_high']:.3f}), length-only {each['length_accuracy']:.3f}, {each['pairs']} pairs"
        for each in found["sources"]
    ]


def samples(
    rows: Sequence[Comparison], scores: Sequence[tuple[float, float]], most: int = 8
) -> list[dict[str, object]]:
    """The pairs that the model gets most wrong, worst first."""
    worst = sorted(range(len(rows)), key=lambda i: scores[i][0] - scores[i][1])[:most]
    return [
        {
            "prompt": str(rows[i].prompt),
            "chosen": rows[i].chosen,
            "rejected": rows[i].rejected,
            "chosen_score": scores[i][0],
            "rejected_score": scores[i][1],
        }
        for i in worst
    ]
