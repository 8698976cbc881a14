"""Weights, and what training adds to them: gradients and Adam's moments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_exp.memory.activations import FLOAT
from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.memory.counted import BYTES, GRADIENTS, OPTIMISER, PARAMETERS, PASSING, STEP, TRAIN, Facts, Item
from rlhf_exp.model import quantize
from rlhf_exp.schema import DPORun, ExportRun, KTORun, ProbeRun, RewardRun, Run, SFTRun

# bytes a trained number of Adam's moments; of 8 bits a byte each, and a float32 for 256 of them
MOMENTS = {"float32": 8.0, "8bit": 2 * (1 + FLOAT / 256)}


def base_bytes(model: Architecture, dtype: str, quantization: str) -> float:
    """Bytes of the frozen base. Quantised are the matrices of its layers, but not what has a row for each token."""
    width = BYTES[dtype]
    if quantization == "none":
        return model.parameters * width
    vectors = sum(math.prod(shape) for shape in model.weights.values() if len(shape) < 2)
    kept = model.by_token + vectors
    return kept * width + (model.parameters - kept) * quantize.BYTES[quantization]


def largest_matrix(model: Architecture) -> int:
    """Numbers of the largest matrix in a layer."""
    shapes = [shape for shape in model.weights.values() if len(shape) == 2 and shape[0] != model.vocabulary]
    return max(map(math.prod, shapes))


def of_base(config: Run, facts: Facts) -> Iterator[Item]:
    """The one base; its output layer a second time where its logits are made in float32 of a bfloat16 weight."""
    model = facts.model
    if config.lora.full and isinstance(config, SFTRun):
        yield from trained("base", model.parameters, config, facts, label="all weights")
        return
    quantised = config.model.quantization
    yield Item("base", PARAMETERS, base_bytes(model, facts.dtype, quantised))
    if quantised != "none":  # bitsandbytes multiplies by a matrix that it has put back into the base's dtype
        yield Item("base", PASSING, facts.width * largest_matrix(model), label="a matrix, dequantised")
    ours = not isinstance(config, SFTRun | RewardRun | DPORun | KTORun | ExportRun | ProbeRun)
    if ours and facts.width == 2 and facts.device == "cpu":
        output = model.vocabulary * model.hidden
        yield Item("base", PARAMETERS, output * FLOAT, label="output layer in float32")


def numbers(config: Run, facts: Facts) -> int:
    """How many one adapter has."""
    lora = config.lora
    return facts.model.adapter(facts.targets, lora.r, lora.dora)


def trained(role: str, count: float, config: Any, facts: Facts, label: str = "") -> Iterator[Item]:
    """`count` float32 weights that are trained; gradients are there from a batch's first backward to its step."""
    yield Item(role, PARAMETERS, FLOAT * count, label=label)
    yield Item(role, GRADIENTS, FLOAT * count, (*TRAIN, STEP))
    yield Item(role, OPTIMISER, MOMENTS[config.optim.moments] * count)
    if facts.device == "cuda" and config.optim.moments == "float32":
        # torch steps all weights at once there, and holds a root of every second moment; elsewhere one after another
        yield Item(role, OPTIMISER, FLOAT * count, (STEP,), label="roots of the second moments")


def frozen(role: str, count: float) -> Item:
    """An adapter that is only read."""
    return Item(role, PARAMETERS, FLOAT * count)


def separate(config: Run, facts: Facts) -> Mapping[str, float]:
    """What PPO with four models of their own would hold: role -> bytes of weights, gradients and moments.

    Policy and critic trained in full in float32 with Adam, 16 bytes a number; reference and reward frozen in the
    base's dtype (Yao et al. 2023, DeepSpeed-Chat).
    """
    number = facts.model.parameters
    trained, frozen = number * (2 * FLOAT + MOMENTS["float32"]), number * facts.width
    return {"policy": trained, "critic": trained, "ref": frozen, "reward": frozen}
