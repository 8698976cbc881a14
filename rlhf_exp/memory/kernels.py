"""What oneDNN compiles on a CPU: code for each product of a shape that it has not seen, kept until there are 1024.

All bfloat16 products go to it, of float32 ones those of frozen matrices where MKL is slow (algorithms/product.py). It
keeps no copy of a weight. Rows of a batch are as long as its longest: each batch may bring shapes of its own, and in
bfloat16 so does each token that is decoded, whose keys are one more.
"""

from __future__ import annotations

import math

from rlhf_exp.memory.activations import QUERIES
from rlhf_exp.memory.counted import LIBRARIES, Facts, Item
from rlhf_exp.processor import INTEL, vendor
from rlhf_exp.schema import EvalRun, ExportRun, PPORun, PreferRun, ProbeRun, RFTRun, Run

# bytes of a product's code, measured: benchmarks/kernels.py gives 0.68 MB, the matrices of SmolLM2 0.5 to 0.8
CODE = 0.65e6
MOST = 1024  # of oneDNN's cache of primitives
ATTENTION = (2, 5)  # products of a block of queries (model/attention.py): forward, backward


def kernels(config: Run, facts: Facts) -> list[Item]:
    """The code of a whole run, of which no batch has another's shapes."""
    if facts.device != "cpu" or isinstance(config, ExportRun):
        return []
    half = facts.width == 2
    if not half and not multiplies_float32():
        return []
    shapes = min(MOST, _trained(config, facts, half) + _sampled(config, facts, half))
    return [Item("process", LIBRARIES, CODE * shapes, label=f"code of {shapes} products")]


def _products(facts: Facts, half: bool) -> tuple[int, int]:
    """Products of different shapes in a forward and in a backward: the frozen matrices', in bfloat16 LoRA's too."""
    layer = {
        name.split(".")[-2]: shape for name, shape in facts.model.weights.items() if _in_layer(name, shape)
    }
    frozen = len(set(layer.values()))
    wrapped = [shape for name, shape in layer.items() if name in facts.targets]
    adapters = half * (len({out for out, _ in wrapped}) + len({width for _, width in wrapped}))
    return frozen + adapters, frozen + 2 * adapters


def _in_layer(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and ".0." in f".{name}"


def _trained(config: Run, facts: Facts, half: bool) -> int:
    """Of the micro-batches of a run, as many as have different lengths."""
    if not hasattr(config, "optim"):
        return 0
    settings = config.ppo if isinstance(config, PPORun) else config.train
    rows = settings.batch_size * (config.ppo.samples_per_prompt if isinstance(config, PPORun) else 1)
    parts = math.ceil(rows / facts.ranks / (settings.micro_batch_size or rows))
    sampled = isinstance(config, PPORun | RFTRun)
    answer = config.generation.max_new_tokens if sampled else config.dataset.max_response_tokens
    length = config.dataset.max_prompt_tokens + answer
    different = min((settings.steps or MOST) * parts, length)
    attention = half * sum(ATTENTION) * math.ceil(length / QUERIES)
    return different * (sum(_products(facts, half)) + attention)


def _sampled(config: Run, facts: Facts, half: bool) -> int:
    """Of the prompts' forwards, and of each token."""
    if not isinstance(config, PPORun | RFTRun | EvalRun | PreferRun | ProbeRun):
        return 0
    times = config.ppo.steps if isinstance(config, PPORun) else 1
    forward, _ = _products(facts, half)
    if isinstance(config, ProbeRun):
        return times * forward
    each = half * ATTENTION[0] * config.generation.max_new_tokens
    return times * (2 * forward + each)


def multiplies_float32() -> bool:
    """Whether the processor is one whose float32 products go to oneDNN: not Intel's (algorithms/product.py)."""
    return vendor() not in ("", INTEL)
