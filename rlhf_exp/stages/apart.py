"""Nothing that was trained on is evaluated on, in whatever stage it was, and whatever split each stage has cut."""

from __future__ import annotations

from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import opening_id
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Run, data_views
from rlhf_exp.stages.nodes import Plan


def require_apart(plan: Plan) -> None:
    """InputError where a held-out prompt of `eval` is a training prompt of another stage of the plan.

    Stages with the same dataset and shares cannot meet: the split comes from the prompt's hash. Those with other
    shares, or another dataset that holds some of the same prompts, can.
    """
    config = plan.target.config
    if plan.target.stage != "eval" or config.dataset.evaluate_on == "train":
        return
    heldout = {opening_id(record.prompt) for record in load_view(config.dataset, "prompts", "heldout")}
    problems = []
    for node in plan.nodes:
        if node is plan.target or node.config is None:
            continue
        if both := len(heldout & trained_on(node.config)):
            problems.append(
                f"{both} of {len(heldout)} held-out prompts of eval are training prompts of {node.stage}: give both "
                "the same dataset.validation_share and dataset.heldout_share, or data without common prompts (they "
                f"are {shares(config)} and {shares(node.config)})"
            )
    if problems:
        raise InputError(problems)


def trained_on(config: Run) -> set[int]:
    """The opening ids of a stage's training prompts."""
    return {
        opening_id(record.prompt)
        for view in data_views(config)
        for record in load_view(config.dataset, view, "train")
    }


def shares(config: Run) -> str:
    data = config.dataset
    return f"{data.name} {data.validation_share:g}, {data.heldout_share:g}"
