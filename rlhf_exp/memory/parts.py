"""What a stage holds: by role, by kind, and in which of its phases.

Bytes of one process that does all the work; strategies.py says what is left of them on each of several. A phase's
sum is what it needs, the largest of these is the peak.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_exp.memory import sampling, training, weights
from rlhf_exp.memory.activations import FLOAT
from rlhf_exp.memory.counted import LIBRARIES, PARAMETERS, PROCESS, Batch, Facts, Item
from rlhf_exp.memory.kernels import kernels
from rlhf_exp.schema import (
    DPORun,
    EvalRun,
    ExportRun,
    ILQLRun,
    KTORun,
    PPORun,
    PreferRun,
    ProbeRun,
    RewardRun,
    RFTRun,
    Run,
    SFTRun,
)


def items(config: Run, facts: Facts) -> list[Item]:
    """Everything that a stage holds on its device, the base first."""
    process = [Item("process", LIBRARIES, PROCESS)] if facts.device == "cpu" else []
    process += kernels(config, facts)
    second = [item for model in facts.beside for item in model.items()]
    return [*weights.of_base(config, facts), *_of_stage(config, facts), *second, *process]


def _of_stage(config: Run, facts: Facts) -> Iterator[Item]:
    if isinstance(config, SFTRun):
        yield from training.sft(config, facts)
    elif isinstance(config, RewardRun):
        yield from training.reward(config, facts)
    elif isinstance(config, DPORun | KTORun):
        yield from training.direct(config, facts)
    elif isinstance(config, ILQLRun):
        yield from training.ilql(config, facts)
    elif isinstance(config, RFTRun):
        yield from sampling.rft(config, facts)
    elif isinstance(config, PPORun):
        yield from sampling.ppo(config, facts)
    elif isinstance(config, EvalRun | PreferRun):
        yield from sampling.answering(config, facts)
    elif isinstance(config, ProbeRun):
        yield from _probe(config, facts)
    elif isinstance(config, ExportRun):
        yield _export(config, facts)


def _probe(config: ProbeRun, facts: Facts) -> Iterator[Item]:
    yield weights.frozen("reward", weights.numbers(config, facts))
    prompt, answer = config.dataset.max_prompt_tokens, config.dataset.max_response_tokens
    yield sampling.scoring(facts, Batch(sampling.EVAL_ROWS, prompt, answer))


def _export(config: ExportRun, facts: Facts) -> Item:
    """What is written: merged weights, in float32, are a copy of the base."""
    merged = config.export.form == "merged"
    copy = facts.model.parameters if merged else weights.numbers(config, facts)
    return Item("export", PARAMETERS, FLOAT * copy, label="merged weights" if merged else "adapter")
