"""Everything that can be found wrong before anything is loaded or trained, all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf_exp.data.load import check_view
from rlhf_exp.errors import InputError
from rlhf_exp.model import shapes
from rlhf_exp.schema import VIEW, EvalRun, Lora, Model, PPORun
from rlhf_exp.stages import adapters
from rlhf_exp.stages.plan import Node, Plan
from rlhf_exp.store.preflight import require_space, require_writable

SPLITS = {"sft": ("train",), "reward": ("train", "validation"), "ppo": ("train",), "eval": ("heldout",)}
SPARE = 100e6  # bytes for logs, tables, figures and MLflow's database


def check(plan: Plan) -> None:
    """Raise InputError unless the plan can run: data, adapters, LoRA targets, disk."""
    problems: list[str] = []
    for test in _tests(plan):
        try:
            test()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(dict.fromkeys(problems))


def _tests(plan: Plan) -> Iterator[Callable[[], None]]:
    output = plan.config.output_dir
    yield lambda: require_writable(output)
    for node in plan.nodes:
        if node.given and plan.base.folder:
            yield lambda node=node: adapters.check(node.stage, node.given, plan.base.folder, plan.base.hash)
        if node.config is not None and not node.found:
            view = VIEW[node.stage]
            yield lambda node=node, view=view: check_view(node.config.dataset, view, SPLITS[node.stage])
            if plan.base.folder:
                yield lambda node=node: _targets(node, plan)
                yield lambda node=node: _context(node, plan)
    yield lambda: require_space(output, disk_needed(plan))


def targets_of(lora: Lora, model: Model) -> list[str]:
    """The module names that LoRA wraps."""
    return model.lora_targets if lora.targets == ["auto"] else lora.targets


def _targets(node: Node, plan: Plan) -> None:
    targets = targets_of(node.config.lora, node.config.model)
    if not targets:
        raise InputError(
            f"lora.targets=[auto], but model {node.config.model.name} names no lora_targets: set one of the two"
        )
    shapes.require_targets(shapes.of_model(plan.base.folder), targets, node.config.model.name)


def _context(node: Node, plan: Plan) -> None:
    """Positions past the model's context would be computed without an error, and wrongly."""
    config, most = node.config, shapes.context_of(plan.base.folder)
    key, answer = "dataset.max_response_tokens", config.dataset.max_response_tokens
    if isinstance(config, PPORun | EvalRun):
        key, answer = "generation.max_new_tokens", config.generation.max_new_tokens
    prompt = config.dataset.max_prompt_tokens
    if most is not None and prompt + answer > most:
        raise InputError(
            f"dataset.max_prompt_tokens={prompt} + {key}={answer} = {prompt + answer} tokens, but model "
            f"{config.model.name} has positions for {most}: lower one of the two"
        )


def disk_needed(plan: Plan) -> float:
    """Bytes: each stage's adapters, twice (run folder and MLflow), and something for the logs."""
    if plan.base.folder is None:
        return SPARE
    needed = SPARE
    weights = shapes.of_model(plan.base.folder)
    for node in plan.missing:
        if node.stage == "eval":
            continue
        size = 4 * shapes.lora_size(
            weights, targets_of(node.config.lora, node.config.model), node.config.lora.r
        )
        kept = node.config.ppo.steps // node.config.ppo.save_every if isinstance(node.config, PPORun) else 0
        needed += size * (2 + kept)
    return needed
