"""What reward runs measured of their own models, for the report of an evaluation that they score."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_exp.evaluation.reward_section import RewardModel
from rlhf_exp.probes import show
from rlhf_exp.schema import EvalRun, proxies
from rlhf_exp.stages import gate, reward_eval
from rlhf_exp.stages.context import EVALUATION, Context


def models(config: EvalRun, context: Context) -> list[RewardModel]:
    """Each model whose scores are the reward; of one that came as an adapter alone nothing is known."""
    limits = asdict(config.reward_source.limits)
    found = []
    for name in proxies(config.reward_source):
        folder = context.parents[name]
        pairs = _read(folder / EVALUATION / reward_eval.REPORT)
        probes = _read(folder / gate.PROBE / gate.REPORT)
        found.append(RewardModel(name, pairs, show.panels(probes, limits) if probes else ()))
    return found


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
