"""Values in strategy.deepspeed that DeepSpeed would stumble over: it looks at some of them late, at others never."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhf_exp.fields import did_you_mean

KEY = "strategy.deepspeed"
ZERO = f"{KEY}.zero_optimization"
OFFLOADS = ("offload_param", "offload_optimizer")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


FLAG, WHOLE = (_flag, "true or false"), (_whole, "a whole number from 1 on")
# what a key takes: whether a value is such a one, and how it is called
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "communication_data_type": (lambda value: value in ("fp32", "fp16", "bf16"), "fp32, fp16 or bf16"),
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": (_factor, "a number above 0"),
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "steps_per_print": WHOLE,
    "gradient_clipping": (lambda value: _factor(value) or value == 0, "a number from 0 on"),
    "comms_logger": (lambda value: isinstance(value, Mapping), "settings such as {enabled: true}"),
    "aio": (lambda value: isinstance(value, Mapping), "settings such as {queue_depth: 8}"),
}
AIO = {
    "block_size": WHOLE,
    "queue_depth": WHOLE,
    "intra_op_parallelism": WHOLE,
    "single_submit": FLAG,
    "overlap_events": FLAG,
    "use_gds": FLAG,
}
COMMS = {
    "enabled": FLAG,
    "verbose": FLAG,
    "prof_all": FLAG,
    "debug": FLAG,
    "prof_ops": (lambda value: isinstance(value, list), "a list of names"),
}


def value_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Of the settings beside zero_optimization; a null leaves DeepSpeed's own."""
    for key, known in (("", VALUES), ("aio", AIO), ("comms_logger", COMMS)):
        section = given.get(key) if key else given
        if not isinstance(section, Mapping):
            continue
        place = f"{KEY}.{key}" if key else KEY
        for name, value in section.items():
            if key and name not in known:
                yield f"unknown key {place}.{name}{did_you_mean(name, list(known))}"
            elif name in known and value is not None and not known[name][0](value):
                yield f"{place}.{name} must be {known[name][1]}, got {value!r}"


def stage_problem(stage: Any, own: int, strategy: str) -> Iterator[str]:
    """zero_optimization.stage, which the strategy says already."""
    if _whole(stage) and stage == own:
        return
    if _whole(stage) and stage <= 3:
        yield f"{ZERO}.stage={stage} contradicts strategy={strategy}: choose strategy=zero{stage}"
    else:
        yield f"{ZERO}.stage must be {own} with strategy={strategy}, got {stage!r}: leave it out"


def section_problems(zero: Mapping[str, Any], stage: int, strategy: str) -> Iterator[str]:
    """offload_param and offload_optimizer are sections; settings of stage 3 do nothing under another."""
    from rlhf_exp.strategies.zero_adamw import FOR_THE_OPTIMISER

    for part in OFFLOADS:
        section = zero.get(part)
        if section is not None and not isinstance(section, Mapping):
            yield f"{ZERO}.{part} must hold settings such as {{device: cpu}}, got {section!r}"
    for key in zero if stage < 3 else ():
        if key == "stage" or key in FOR_THE_OPTIMISER or not _of_stage_3(key):
            continue
        better = "strategy=zero3_offload" if key == "offload_param" else "strategy=zero3"
        yield (
            f"{ZERO}.{key} is about the base's shards, and strategy={strategy} has none: choose {better}, or leave "
            "it out"
        )


def _of_stage_3(key: str) -> bool:
    return key == "offload_param" or key.startswith("stage3_") or key == "sub_group_size"


def combination_problems(given: Mapping[str, Any], zero: Mapping[str, Any], stage: int) -> Iterator[str]:
    """DeepSpeed divides gradients in its own way only where it reduces all of them."""
    if stage == 1 or zero.get("reduce_scatter", True) is False:
        return
    asked = [("prescale_gradients", True)] if given.get("prescale_gradients") is True else []
    factor = given.get("gradient_predivide_factor")
    if factor is not None and _factor(factor) and factor != 1:
        asked.append(("gradient_predivide_factor", factor))
    for key, value in asked:
        shown = str(value).lower() if isinstance(value, bool) else f"{value:g}"
        yield f"{KEY}.{key}={shown} needs {ZERO}.reduce_scatter=false, or strategy=zero1: leave it out"
