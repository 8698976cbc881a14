"""The memory plan of a command: what each stage needs, printed by `dry_run=true`, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from rlhf_exp import compose, distributed
from rlhf_exp.errors import InputError
from rlhf_exp.memory import architecture, counted, free, parts, strategies, table, travel, weights
from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.memory.counted import Facts, Item
from rlhf_exp.memory.levers import Lever, levers
from rlhf_exp.memory.strategies import Rank
from rlhf_exp.memory.table import gigabytes
from rlhf_exp.schema import PPORun, Run, problems
from rlhf_exp.stages import second_models
from rlhf_exp.stages.nodes import Node, Plan
from rlhf_exp.stages.preflight import planned, targets_of
from rlhf_exp.strategies import require

SHARED = ("model", "strategy", "memory")


def estimate(plan: Plan) -> Iterator[str]:
    """Lines: for each stage that is still to be built a table, what travels, and what would save memory."""
    if model_of(plan) is None:
        yield f"no memory plan: model {plan.config.model.name} is not here and its preset gives no sizes"
        return
    for node in plan.nodes:
        if node.config is not None and not node.found:
            yield from of_node(node, plan)


def of_node(node: Node, plan: Plan) -> Iterator[str]:
    """A stage's table, its peak on a rank, and the levers."""
    config, facts = node.config, facts_of(node, plan)
    alone, rank = items_of(config, facts, ranks=1), rank_of(config, facts)
    size = f"{facts.model.parameters / 1e9:.3g} B parameters"
    title = f"{node.name}: {config.model.name}, {size}, {stored(node, plan)}, {facts.device}, {ways(config, facts)}"
    yield from table.lines(title, alone, rank.device, rank.host, facts.ranks)
    phase, need = counted.peak(rank.device)
    yield f"peak of {node.name} about {gigabytes(need)} in {phase}" + (
        " on each rank" if facts.ranks > 1 else ""
    )
    if isinstance(config, PPORun):
        yield from _separate(config, facts, node)
    yield from _logits(config, facts)
    if facts.ranks > 1:
        yield from _travels(config, facts, alone)
    room = None if planned(plan) and config.memory.gb is None else room_of(config, facts.device)
    if room is not None:
        verdict = "fits into" if need <= room else "does NOT fit into"
        yield f"{verdict} {gigabytes(room)}" + ("" if config.memory.gb else " that are free here")
    for lever in helps(config, facts):
        yield f"  {typed(lever.setting, node, plan)} saves {gigabytes(lever.saving)}" + (
            f" ({lever.note})" if lever.note else ""
        )


def peak_of(node: Node, plan: Plan) -> tuple[str, float] | None:
    """When a stage needs most on a rank, and how many bytes; None where the model's sizes are not known."""
    if model_of(plan) is None:
        return None
    return counted.peak(rank_of(node.config, facts_of(node, plan)).device)


def stored(node: Node, plan: Plan) -> str:
    """In what the base's weights are held."""
    kind, dtype = node.config.model.quantization, dtype_of(node, plan)
    return dtype if kind == "none" else f"{kind}, embeddings and output layer in {dtype}"


def ways(config: Run, facts: Facts) -> str:
    return f"strategy={config.strategy.name}" + (f", {facts.ranks} ranks" if facts.ranks > 1 else "")


def _separate(config: PPORun, facts: Facts, node: Node) -> Iterator[str]:
    """What four models of their own would take, as PPO is often run."""
    base = weights.base_bytes(facts.model, facts.dtype, config.model.quantization)
    trained = sum(weights.separate(config, facts).values())
    yield (
        f"four separate models: {gigabytes(4 * base)} for their weights, the one base here {gigabytes(base)}; with "
        f"policy and critic trained in full {gigabytes(trained)} with gradients and moments"
    )


def _logits(config: Run, facts: Facts) -> Iterator[str]:
    """What working through logits in chunks saves: it is always on."""
    found = [item for item in parts.items(config, facts) if item.whole]
    held, whole = sum(item.bytes for item in found), sum(item.whole for item in found)
    if held < whole:
        yield f"log-probs in chunks (always on): {gigabytes(held)} in place of {gigabytes(whole)}"


def _travels(config: Run, facts: Facts, alone: list[Item]) -> Iterator[str]:
    found = travel.volume(config, facts, alone)
    said = [f"{gigabytes(found.step)} an optimiser step ({found.why})"] if hasattr(config, "optim") else []
    if found.rollout:
        scored = " and its scores" if isinstance(config, PPORun) else ""
        said.append(f"{gigabytes(found.rollout)} a rollout{scored}")
    if said:
        yield f"sent by each rank: {', '.join(said)}"


# ---------------------------------------------------------------- what is counted


def model_of(plan: Plan) -> Architecture | None:
    """From the model's files, else from its preset's numbers; None if neither says."""
    if plan.base.folder is not None:
        return architecture.of_folder(plan.base.folder, plan.shapes)
    return architecture.of_preset(plan.config.model)


def dtype_of(node: Node, plan: Plan) -> str:
    """Of the base of a stage: all weights are trained in float32."""
    return (node.base or plan.base).dtype


def facts_of(node: Node, plan: Plan) -> Facts:
    """What the counting needs besides the config."""
    config, model, dtype = node.config, model_of(plan), dtype_of(node, plan)
    device = plan.base.device.partition(":")[0]
    return Facts(
        model=model,
        dtype=dtype,
        device=device,
        targets=tuple(targets_of(config.lora, config.model)),
        scorers=tuple(role for role, parent in node.parents.items() if parent.stage == "reward"),
        reference="sft" in node.parents
        and not (node.parents["sft"].is_base or node.parents["sft"].makes_base),
        beside=second_models.of_config(config, model, dtype, device),
        ranks=(plan.config.memory.ranks if plan.config.dry_run else 0) or distributed.world_size(),
    )


def items_of(config: Run, facts: Facts, ranks: int | None = None) -> list[Item]:
    """Of one process among `ranks`, before its weights are divided."""
    return parts.items(config, facts if ranks is None else replace(facts, ranks=ranks))


def rank_of(config: Run, facts: Facts) -> Rank:
    """What one rank holds."""
    return strategies.on_rank(
        items_of(config, facts), config.strategy.name, facts.ranks, facts.model, facts.dtype
    )


def need_of(config: Run, facts: Facts) -> float:
    """Bytes of a rank's peak on its device."""
    return counted.peak(rank_of(config, facts).device)[1]


def helps(config: Run, facts: Facts) -> list[Lever]:
    """The levers that this program would take: advice that it then refuses is none."""
    known = set(_refused(config, facts))

    def allowed(changed: Run) -> bool:
        return known.issuperset(_refused(changed, facts))

    return levers(config, lambda other: need_of(other, facts), allowed, facts.device, facts.ranks)


def _refused(config: Run, facts: Facts) -> Iterator[str]:
    yield from problems(config)
    yield from require.stage_problems(config, facts.ranks)


# ---------------------------------------------------------------- whether it fits


def room_of(config: Run, device: str) -> float | None:
    """Bytes there are for a rank: memory.gb, else its share of what is free; None where nobody says.

    Ranks on one machine, or of one GPU, share its memory alike.
    """
    if config.memory.gb is not None:
        return config.memory.gb * 1e9
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return None
        sharing = math.ceil(distributed.on_this_machine() / torch.cuda.device_count())
        return float(torch.cuda.mem_get_info()[0]) / sharing
    found = free.of_host()
    return None if found is None else found / distributed.on_this_machine()


def require_weights(plan: Plan) -> None:
    """InputError where weights, gradients and moments alone do not fit: that needs no data to be known."""
    if model_of(plan) is None:
        return
    lines = []
    for node in plan.nodes:
        if node.config is None or node.found:
            continue
        config, facts = node.config, facts_of(node, plan)
        room = room_of(config, facts.device)
        kinds = (counted.PARAMETERS, counted.GRADIENTS, counted.OPTIMISER, counted.LIBRARIES)
        held = [item for item in rank_of(config, facts).device if item.kind in kinds]
        need = counted.peak(held)[1]
        if room is not None and need > room:
            lines.append(
                f"{node.name} {short(need, room, config, facts, lambda s, n=node: typed(s, n, plan))}"
            )
    if lines:
        raise InputError(lines)


def short(
    need: float, room: float, config: Run, facts: Facts, words: Callable[[str], str] = lambda setting: setting
) -> str:
    """What is missing, and what helps, in a line. words: how a setting is typed."""
    found = helps(config, facts)
    enough = [lever for lever in found if need_of(config, facts) - lever.saving <= room]
    named = enough[:2] or found[:2]
    said = [f"{words(lever.setting)} (saves {gigabytes(lever.saving)})" for lever in named]
    advice = f"set {' or '.join(said)}" if said else "choose a smaller model"
    if said and not enough:
        advice += "; no single one is enough, so that it may take a smaller model"
    return f"needs {gigabytes(need)} of memory, but there are {gigabytes(room)}: {advice}"


def typed(setting: str, node: Node, plan: Plan) -> str:
    """A setting of a stage as it is typed in this command: of one that the command needs, as `upstream`.

    What all stages share (model, strategy, memory) is the command's own, as are PPO's keys in a pipeline.
    """
    own = node is plan.target or (plan.config.stage == "pipeline" and node.stage in ("ppo", "eval"))
    if own or setting.partition(".")[0].partition("=")[0] in SHARED:
        return setting
    key, _, value = setting.partition("=")
    *sections, last = key.split(".")
    inner = f"{last}: {value}"
    for section in reversed(sections):
        inner = f"{section}: {{{inner}}}"
    name = node.name if node.name in compose.ON_TOP else node.stage  # members of an ensemble are set as one
    return f"'upstream.{name}={{{inner}}}'"
