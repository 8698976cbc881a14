"""A rough estimate of the memory that a plan needs, by role, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlhf_exp.model import quantize, shapes
from rlhf_exp.model.shapes import Size
from rlhf_exp.schema import DPORun, ExportRun, ILQLRun, KTORun, PPORun, ProbeRun, RewardRun, SFTRun
from rlhf_exp.stages.nodes import Node, Plan
from rlhf_exp.stages.preflight import targets_of

BYTES = {"bfloat16": 2, "float32": 4}
# a trained float32 number: the weight, its gradient, Adam's two moments
TRAINED = 16
ROWS = 64  # answers that eval generates together
# hidden-sized arrays a layer keeps for the backward, about: norms, q k v o, gate and up (2.7 times as wide), LoRA's
# float32 copies of the inputs
KEPT_PER_LAYER = 24
LOGITS = 4 * 4 * 2**24  # the chunk of logits and what is computed from it (algorithms/logprob.py)


def estimate(plan: Plan) -> Iterator[str]:
    """Lines: the base once, then what each stage adds at its peak; and what four separate models would take."""
    size = size_of(plan)
    if size is None:
        yield f"no memory estimate: model {plan.config.model.name} is not here and its file gives no sizes"
        return
    base = _base(plan, size)
    kind = plan.config.model.quantization
    stored = (
        plan.base.dtype if kind == "none" else f"{kind}, embeddings and output layer in {plan.base.dtype}"
    )
    yield f"base {gigabytes(base)} ({size.parameters / 1e9:.3g} B parameters in {stored}), held once"
    peak = base
    for node in plan.nodes:
        if node.config is None or node.found:
            continue
        parts = _stage(node, plan, size)
        peak = max(peak, base + sum(parts.values()))
        yield f"{node.name:6s} + " + ", ".join(f"{name} {gigabytes(value)}" for name, value in parts.items())
    yield (
        f"peak about {gigabytes(peak)}; with a separate model for each of the four roles the bases alone take "
        + (f"{gigabytes(4 * base)}")
    )


def parts(node: Node, plan: Plan) -> dict[str, float] | None:
    """Bytes that a stage adds to the base at its peak, by what they are for; None where no sizes are known."""
    size = size_of(plan)
    return None if size is None else _stage(node, plan, size)


def size_of(plan: Plan) -> Size | None:
    """From the model's files, else from its config file's sizes; None if neither says."""
    model = plan.config.model
    if plan.base.folder is not None:
        return shapes.size_of(plan.base.folder, plan.shapes)
    facts = (model.billion_params, model.layers, model.hidden_size, model.vocab_size)
    return None if None in facts else Size(int(facts[0] * 1e9), *facts[1:])


def _base(plan: Plan, size: Size) -> float:
    """Bytes of the frozen base. Quantised are the matrices of its layers, but not what has a row for each token."""
    width, kind = BYTES[plan.base.dtype], plan.config.model.quantization
    if kind == "none":
        return size.parameters * width
    if plan.base.folder is None:
        kept = 2 * size.vocab_size * size.hidden_size  # embeddings and output layer, for want of shapes
    else:
        small = (s for s in plan.shapes.values() if len(s) < 2 or s[0] == size.vocab_size)
        kept = sum(math.prod(shape) for shape in small)
    return kept * width + (size.parameters - kept) * quantize.BYTES[kind]


def _stage(node: Node, plan: Plan, size: Size) -> dict[str, float]:
    config, width = node.config, BYTES[plan.base.dtype]
    adapter = _adapter_parameters(node, plan, size)
    data = config.dataset
    if isinstance(config, SFTRun | RewardRun):
        rows = min(config.train.micro_batch_size, config.train.batch_size) * (
            1 + isinstance(config, RewardRun)
        )
        tokens = rows * (data.max_prompt_tokens + data.max_response_tokens)
        if isinstance(config, RewardRun) and config.reward.share_prompts:
            pair = data.max_prompt_tokens + 2 * data.max_response_tokens
            tokens = rows // 2 * pair
            if limit := config.reward.micro_batch_tokens:
                tokens = min(tokens, max(limit, pair))
        if config.lora.full:
            return {
                "all weights": TRAINED * size.parameters,
                "activations": tokens * _kept(size, BYTES["float32"]),
            }
        return {"adapter": TRAINED * adapter, "activations": tokens * _kept(size, width)}
    if isinstance(config, DPORun | KTORun):
        rows = 2 * min(config.train.micro_batch_size, config.train.batch_size)
        tokens = rows * (data.max_prompt_tokens + data.max_response_tokens)
        return {
            "policy": TRAINED * adapter,
            "ref": 4 * adapter,
            "activations": tokens * _kept(size, width),
            "logits": LOGITS,
        }
    if isinstance(config, ExportRun):
        return (
            {"merged weights": size.parameters * 4}
            if config.export.form == "merged"
            else {"adapter": 4 * adapter}
        )
    if isinstance(config, ILQLRun):
        tokens = min(config.train.micro_batch_size, config.train.batch_size) * (
            data.max_prompt_tokens + data.max_response_tokens
        )
        q_head = shapes.q_head(config.ilql.head, size.hidden_size, size.vocab_size)
        return {
            "adapter": TRAINED * adapter,
            "heads": 2 * (TRAINED + 4) * q_head,  # twins, and their copies that are not trained
            "activations": tokens * _kept(size, width),
            "logits": LOGITS,
        } | ({"reward": _models(node) * 4 * adapter} if _models(node) else {})
    if isinstance(config, ProbeRun):
        return {"reward": 4 * adapter}
    rows = config.ppo.batch_size * config.ppo.samples_per_prompt if isinstance(config, PPORun) else ROWS
    length = data.max_prompt_tokens + config.generation.max_new_tokens
    cache = 2 * rows * length * size.layers * size.hidden_size * width
    if not isinstance(config, PPORun):
        return {
            "adapters": (2 + _models(node)) * 4 * adapter,  # with candidate and ref
            "KV cache": cache,
            "logits": LOGITS,
        }
    trained = 2 if config.ppo.critic == "own" and config.ppo.estimator == "gae" else 1
    return {
        "policy": trained * TRAINED * adapter,
        "ref and reward": (1 + _models(node)) * 4 * adapter,
        "KV cache": cache,
        "activations": min(rows, config.ppo.micro_batch_size) * length * _kept(size, width),
        "logits": LOGITS,
    }


def _models(node: Node) -> int:
    """Reward models that a stage holds, an ensemble's and the gold scorer included."""
    return sum(parent.stage == "reward" for parent in node.parents.values())


def _kept(size: Size, width: int) -> int:
    """Bytes a token that the backward needs."""
    return size.layers * size.hidden_size * KEPT_PER_LAYER * width


def _adapter_parameters(node: Node, plan: Plan, size: Size) -> int:
    lora = node.config.lora
    targets = targets_of(lora, node.config.model)
    if plan.base.folder is None:  # square matrices, for want of shapes
        return lora.r * 2 * size.hidden_size * size.layers * len(targets)
    return shapes.lora_size(plan.shapes, targets, lora.r, lora.dora)


def gigabytes(value: float) -> str:
    """2.1 GB, or MB below one tenth."""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.0f} MB"
