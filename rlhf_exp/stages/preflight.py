"""Everything that can be found wrong before anything is loaded or trained, all problems at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_exp import distributed
from rlhf_exp.data.encode import encode_prompts
from rlhf_exp.data.load import check_view
from rlhf_exp.data.templates import frame
from rlhf_exp.errors import InputError
from rlhf_exp.model import quantize, shapes
from rlhf_exp.model.base import content_hash
from rlhf_exp.model.loading import read_tokenizer
from rlhf_exp.rewards import functions, judge
from rlhf_exp.schema import (
    JUDGE,
    EvalRun,
    ExportRun,
    ILQLRun,
    Lora,
    Model,
    PPORun,
    PreferRun,
    ProbeRun,
    RewardRun,
    RFTRun,
    Run,
    data_views,
    labelled,
)
from rlhf_exp.stages import adapters, compared_check, data_answers, gate, margins
from rlhf_exp.stages.apart import require_apart
from rlhf_exp.stages.context import MODEL
from rlhf_exp.stages.nodes import Node, Plan
from rlhf_exp.store.preflight import require_space, require_writable
from rlhf_exp.strategies import require

SPLITS = {"sft": ("train",), "reward": ("train", "validation"), "ppo": ("train",), "eval": ("heldout",)}
SPLITS |= {"ilql": ("train", "validation"), "probe": (), "prefer": ("train", "validation")}
SPLITS |= {"dpo": ("train", "validation"), "kto": ("train", "validation"), "rft": ("train",)}
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
            yield lambda node=node: _given(node, plan)
        if node.config is not None:
            yield lambda node=node: data_answers.kind_of(node.config)
        if node.config is not None and not node.found:
            yield lambda node=node: _ranks(node.config)
            for view in data_views(node.config):
                yield lambda node=node, view=view: check_view(node.config.dataset, view, SPLITS[node.stage])
            if isinstance(node.config, ProbeRun):
                yield lambda node=node: _probes(node.config)
            if isinstance(node.config, PPORun):
                yield lambda node=node: _algorithm(node)
            if isinstance(node.config, RewardRun) and not labelled(node.config):
                yield lambda node=node: margins.require(node.config)
            if isinstance(node.config, PreferRun):
                yield lambda node=node: _judge(node.config, plan)
            if isinstance(node.config, EvalRun):
                yield lambda node=node: compared_check.require(node, plan)
            if isinstance(node.config, RewardRun) and node.config.reward.faults:
                yield lambda node=node: _reward(node.config)
            if isinstance(node.config, ExportRun) and plan.base.folder:
                yield lambda node=node: exportable(node.config, plan.base.folder)
            yield lambda node=node: functions.check_config(node.config)
            if hasattr(node.config, "optim") and not planned(plan):
                yield lambda node=node: quantize.require_moments(node.config.optim, plan.base.device)
            if plan.base.folder:
                yield lambda node=node: _targets(node, plan)
                yield lambda node=node: _context(node, plan)
                yield lambda node=node: _texts(node, plan)
    yield lambda: _strategy(plan.config)
    yield lambda: require_apart(plan)
    yield lambda: gate.check(plan)
    if plan.base.folder:
        yield lambda: _tokenizer(plan)
    if not plan.config.dry_run:  # which shows the whole plan
        yield lambda: _memory(plan)
    yield lambda: _space(output, plan)


def _space(output: str, plan: Plan) -> None:
    try:
        require_writable(output)
    except InputError:
        return  # said already: a place that takes no files has no space either
    require_space(output, disk_needed(plan))


def planned(plan: Plan) -> bool:
    """Whether this is a plan for another kind of device than this machine's."""
    return plan.config.dry_run and plan.config.memory.device != "auto"


def _memory(plan: Plan) -> None:
    """Weights, gradients and moments have to fit, whatever the data."""
    from rlhf_exp.stages import memory  # imports this module

    memory.require_weights(plan)


def _ranks(config: Run) -> None:
    """What the strategy needs of a stage."""
    if problems := list(require.stage_problems(config, distributed.world_size())):
        raise InputError(problems)


def _strategy(config: Run) -> None:
    if problems := list(require.config_problems(config, distributed.world_size())):
        raise InputError(problems)


def _judge(config: PreferRun, plan: Plan) -> None:
    """What the judge of prefer.labellers=[judge] is and asks."""
    if JUDGE in config.prefer.labellers:
        judge.check(config.judge, plan.base.folder)


def _probes(config: ProbeRun) -> None:
    """A split that is empty on purpose is fine for training, but leaves nothing to probe with."""
    if config.probe.split == "validation" and not config.dataset.validation_share:
        raise InputError("probe.split=validation needs dataset.validation_share above 0")
    if not labelled(config):
        check_view(config.dataset, "comparisons", (config.probe.split,))


def _algorithm(node: Node) -> None:
    """What PPO's options need of the data; that its faults exist and can be seen."""
    from rlhf_exp.stages import references

    references.require(node.config)
    if node.config.ppo.faults:
        from rlhf_exp.stages import faults  # imports torch

        sft = node.parents["sft"]
        faults.require(node.config.ppo.faults)
        faults.require_effect(node.config, not (sft.is_base or sft.makes_base))


def _reward(config: RewardRun) -> None:
    """The names of the reward model's faults."""
    from rlhf_exp.stages import reward_faults  # imports torch

    reward_faults.require(config.reward)


def exportable(config: ExportRun, folder: Path) -> None:
    """What transformers has no class for cannot be loaded by plain transformers."""
    from rlhf_exp.model import export  # imports torch

    kind = shapes.model_type(folder)
    name, role = config.model.name, config.export.role
    if role == "reward" and not export.classifier(kind):
        raise InputError(
            f"export.role=reward: transformers has no AutoModelForSequenceClassification for {name} ({kind})"
        )
    if config.export.form == "merged" and not export.published(kind):
        raise InputError(
            f"export.form=merged: transformers has no class for {name} ({kind}), so that it could not be loaded: "
            "export.form=adapter"
        )
    if config.export.form == "merged" and config.model.quantization != "none":
        raise InputError(
            f"export.form=merged adds to the base's weights, which model.quantization={config.model.quantization} "
            "has rounded: set model.quantization=none, or export.form=adapter"
        )


def _given(node: Node, plan: Plan) -> None:
    """A given adapter must belong to the base that it will be put on."""
    folder, content = plan.base.folder, plan.base.hash
    sft = next((n for n in plan.nodes if n.makes_base), None)
    if sft is not None:
        if sft.folder is None:
            raise InputError(
                f"{node.setting}={node.given} cannot belong to the base that sft is still to make "
                "(lora.full): train sft first, or leave the adapter out"
            )
        folder = sft.folder / MODEL
        content = content_hash(folder)
    adapters.check(node.stage, node.given, folder, content, node.setting)


def targets_of(lora: Lora, model: Model) -> list[str]:
    """The module names that LoRA wraps."""
    return model.lora_targets if lora.targets == ["auto"] else lora.targets


def _targets(node: Node, plan: Plan) -> None:
    if node.config.lora.full:
        quantize.require(node.config.model, plan.base.device, node.config.lora)
        return
    targets = targets_of(node.config.lora, node.config.model)
    if not targets:
        raise InputError(
            f"lora.targets=[auto], but model {node.config.model.name} names no lora_targets: set one of the two"
        )
    shapes.require_targets(plan.shapes, targets, node.config.model.name)


def _texts(node: Node, plan: Plan) -> None:
    """The sampler's stop texts and suppressed tokens, which only the model's tokenizer can tell."""
    generation = getattr(node.config, "generation", None)
    if generation is None or not (generation.stop or generation.begin_suppress_tokens):
        return
    from rlhf_exp.rollout.texts import check_texts

    check_texts(generation, read_tokenizer(plan.config.model, plan.base.folder))


def _tokenizer(plan: Plan) -> None:
    """What only the tokenizer can tell of templates: a chat template that is missing, a frame that is too long."""
    asked = []
    for node in plan.missing:
        data = node.config.dataset
        try:
            # a frame of fewer characters than there is room for tokens fits whatever the tokenizer is
            fits = not data.template.chat and len(str(frame(data.template, ""))) <= data.max_prompt_tokens
        except ValueError:  # a format without its placeholder: check_view says so
            continue
        if not fits:
            asked.append(data)
    if not asked and plan.config.model.eos_token is None:
        return
    tokenizer = read_tokenizer(plan.config.model, plan.base.folder)
    for data in asked:
        encode_prompts(tokenizer, data, [""])


def _context(node: Node, plan: Plan) -> None:
    """Positions past the model's context would be computed without an error, and wrongly."""
    config, most = node.config, shapes.context_of(plan.base.folder)
    key, answer = "dataset.max_response_tokens", config.dataset.max_response_tokens
    sampled = isinstance(config, PPORun | EvalRun | ILQLRun | PreferRun | RFTRun)
    if sampled and not (_reads_answers(config) and answer > config.generation.max_new_tokens):
        key, answer = "generation.max_new_tokens", config.generation.max_new_tokens
    prompt = config.dataset.max_prompt_tokens
    if most is not None and prompt + answer > most:
        raise InputError(
            f"dataset.max_prompt_tokens={prompt} + {key}={answer} = {prompt + answer} tokens, but model "
            f"{config.model.name} has positions for {most}: lower one of the two"
        )


def _reads_answers(config: PPORun | EvalRun | ILQLRun) -> bool:
    """Whether a stage that writes answers computes over those of the data too."""
    if isinstance(config, PPORun):
        return config.ppo.score_scaling == "reference" or config.ppo.ptx_coef > 0
    return isinstance(config, ILQLRun) or data_answers.kind_of(config) is not None


def disk_needed(plan: Plan) -> float:
    """Bytes: each stage's adapters, twice (run folder and MLflow), and something for the logs."""
    if plan.base.folder is None:
        return SPARE
    needed = SPARE
    weights = plan.shapes
    for node in plan.missing:
        if node.stage in ("eval", "probe", "prefer"):
            continue
        if isinstance(node.config, ExportRun) and node.config.export.form == "merged":
            needed += 4 * sum(math.prod(shape) for shape in weights.values())
            continue
        if node.makes_base:
            needed += 4 * sum(math.prod(shape) for shape in weights.values())
            continue
        lora = node.config.lora
        size = 4 * shapes.lora_size(weights, targets_of(lora, node.config.model), lora.r, lora.dora)
        if isinstance(node.config, ILQLRun):  # twins and their copies
            found = shapes.size_of(plan.base.folder, weights)
            needed += 2 * 4 * 4 * shapes.q_head(node.config.ilql.head, found.hidden_size, found.vocab_size)
        kept = node.config.ppo.steps // node.config.ppo.save_every if isinstance(node.config, PPORun) else 0
        needed += size * (2 + kept)
    return needed
