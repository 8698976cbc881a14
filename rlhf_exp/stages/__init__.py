"""The stages: each a file that reads from top to bottom, `run(config, context) -> metrics`."""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """Where a stage's `run` is (imported when it runs), and the version of what it computes."""

    module: str
    version: int  # raise it when a change makes old results wrong to reuse: it is in the key


STAGES = {
    "sft": Stage("rlhf_exp.stages.sft", 1),
    "prefer": Stage("rlhf_exp.stages.prefer", 1),
    "reward": Stage("rlhf_exp.stages.reward", 1),
    "probe": Stage("rlhf_exp.stages.probe", 1),
    "ppo": Stage("rlhf_exp.stages.ppo", 1),
    "ilql": Stage("rlhf_exp.stages.ilql", 2),
    "dpo": Stage("rlhf_exp.stages.direct", 1),
    "kto": Stage("rlhf_exp.stages.direct", 1),
    "rft": Stage("rlhf_exp.stages.rft", 2),
    "eval": Stage("rlhf_exp.stages.evaluate", 2),
    "export": Stage("rlhf_exp.stages.export", 1),
    "report": Stage("rlhf_exp.stages.report", 1),
}
