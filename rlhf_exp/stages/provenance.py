"""Checks of the self-check that are about where things come from: adapters, heads, templates, prompts, memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from rlhf_exp.data.encode import encode_prompts, encode_responses
from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Prompt, opening_id
from rlhf_exp.errors import InputError
from rlhf_exp.memory import counted
from rlhf_exp.memory.free import CGROUP, MEMINFO, of_host
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.rollout.engine import Rollout, judged
from rlhf_exp.schema import VIEW, Dataset, PPORun, Reward
from rlhf_exp.stages import faults, memory, microbatch, reward_faults
from rlhf_exp.stages.actors import Actors
from rlhf_exp.stages.adapters import BASE
from rlhf_exp.stages.context import HEAD_FILE, Context
from rlhf_exp.store.frozen import CONFIG

ANSWER = "This is a known answer."


@dataclass(frozen=True)
class Check:
    """One line of the list. name: as `faults` waives it; cause: what is wrong, and the config key to look at.

    note: where it is not so, the configuration asks for it: the list says it, and nothing stops.
    """

    name: str
    title: str
    ok: bool
    detail: str
    cause: str
    note: bool = False


def adapters(context: Context, stages: Iterable[str]) -> Check:
    """Every adapter says by the hash of its base's content that it belongs to this base."""
    wrong, mute, fine = [], [], []
    for stage in stages:
        folder = context.adapter(stage)
        if folder is None:
            continue
        if not (folder / BASE).is_file():
            mute.append(stage)  # a foreign PEFT folder: its shapes fit, or it would not be loaded
        elif json.loads((folder / BASE).read_text()).get("hash") != context.base.hash:
            wrong.append(stage)
        else:
            fine.append(stage)
    known = ", ".join(fine) or "none was trained here"
    return Check(
        "adapters",
        "adapters belong to this base",
        not wrong,
        (f"not {', '.join(wrong)}" if wrong else known)
        + (f"; by shape alone: {', '.join(mute)}" if mute else ""),
        f"{', '.join(f'adapters.{stage}' for stage in wrong)} was trained on another base: set model to that one",
    )


def reward_heads(context: Context, actors: Actors) -> Check:
    """The heads that score are those that were trained, and saving keeps them bit for bit."""
    wrong = []
    for role, head in actors.reward_heads.items():
        with tempfile.TemporaryDirectory() as folder:
            head.save(Path(folder) / HEAD_FILE)
            others = (ScalarHead.load(Path(folder) / HEAD_FILE), ScalarHead.load(context.head(role)))
        for other in others:
            same = (
                torch.equal(a, b.to(a.device))
                for a, b in zip(head.parameters(), other.parameters(), strict=True)
            )
            if not all(same) and role not in wrong:
                wrong.append(role)
    return Check(
        "reward_head",
        "reward heads are the trained ones after save and load",
        not wrong,
        ", ".join(wrong or actors.reward_heads),
        "the scores would mean nothing: adapters.reward, or train the reward stage again (resume=never)",
    )


def reward_tokens(
    config: PPORun,
    context: Context,
    actors: Actors,
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
) -> Check:
    """A known answer to the shortest prompt: as PPO hands it over, and as each reward model's training has it."""
    tokenizer, eos_id = context.base.tokenizer, context.base.eos_id
    i = min(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    prompt, sampled = list(encoded[i]), encode_responses(tokenizer, config.dataset, [ANSWER])
    rollout = Rollout([prompt], sampled, [sampled[0][-1] == eos_id], [torch.zeros(len(sampled[0]))], None)
    answer = faults.scored_ids(config.ppo, tokenizer, judged(rollout))[0]
    cause, unknown = "", []
    for role in actors.reward_heads:
        dataset = dataset_of(context.parents[role])
        if dataset is None:
            unknown.append(role)
            dataset = config.dataset
        trained = encode_prompts(tokenizer, dataset, [prompts[i].prompt])[0]
        made = reward_of(context.parents[role])
        known = reward_faults.answers(made, encode_responses(tokenizer, dataset, [ANSWER]), eos_id)
        found = difference(role, (prompt, answer), (trained, *known))
        if found and made.faults:
            found += f"; its run had reward.faults=[{', '.join(made.faults)}]"
        cause = cause or found
    return Check(
        "reward_tokens",
        "the reward model sees the tokens it was trained on",
        not cause,
        f"a prompt of {len(prompt)} tokens and an answer of {len(answer)}"
        + (f"; template of a given adapter not known: {', '.join(unknown)}" if unknown else ""),
        cause,
    )


Pair = tuple[list[int], list[int]]  # prompt, answer


def difference(role: str, given: Pair, trained: Pair) -> str:
    """What is not the same, and where to look; nothing if all is."""
    if given[0] != trained[0]:
        what, keys = "prompts", "dataset.template, dataset.max_prompt_tokens"
    elif given[1] != trained[1]:
        ends = given[1] == trained[1][:-1] or given[1][:-1] == trained[1]
        what = "ends" if ends else "answers"
        keys = "model.eos_token, dataset.template.response, dataset.max_response_tokens"
    else:
        return ""
    there = "upstream.reward" if role == "reward" else f"upstream.{role} or upstream.reward"
    return f"the {what} differ from those that {role} was trained on: {keys}, here and in {there}"


def dataset_of(folder: Path) -> Dataset | None:
    """The dataset's settings that a run was made with; None for a folder that is no run's."""
    settings = _settings(folder)
    return None if settings is None else _from_plain(Dataset, settings["dataset"])


def reward_of(folder: Path) -> Reward:
    """How a reward model was trained; the defaults for a folder that is no run's."""
    return _from_plain(Reward, (_settings(folder) or {}).get("reward", {}))


def _settings(folder: Path) -> dict[str, Any] | None:
    """The frozen config of a run."""
    if not (folder / CONFIG).is_file():
        return None
    import yaml

    return yaml.safe_load((folder / CONFIG).read_text())


def _from_plain(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from what dataclasses.asdict made of it; what it has no field for is left out."""
    kinds = get_type_hints(cls)
    found = {
        f.name: _from_plain(kinds[f.name], values[f.name]) if is_dataclass(kinds[f.name]) else values[f.name]
        for f in fields(cls)
        if f.name in values
    }
    return cls(**found)


def overlap(config: PPORun, context: Context, prompts: Sequence[Prompt]) -> Check:
    """No prompt that is trained on, here or by a parent on the same dataset, opens as a held-out one does."""
    name = "overlap", "held-out prompts are not trained on"
    if config.dataset.evaluate_on == "train":
        return Check(*name, True, "dataset.evaluate_on=train asks for it", "")
    try:
        heldout = {opening_id(prompt.prompt) for prompt in load_view(config.dataset, "prompts", "heldout")}
    except InputError:
        return Check(*name, True, "there are none", "")
    shared = {"ppo": sum(opening_id(prompt.prompt) in heldout for prompt in prompts)}
    for stage, folder in context.parents.items():
        theirs = dataset_of(folder) if stage in VIEW else None
        if theirs is not None and theirs.name == config.dataset.name:
            try:
                rows = load_view(theirs, VIEW[stage], "train")
            except InputError:  # its data are no longer here
                continue
            shared[stage] = sum(opening_id(row.prompt) in heldout for row in rows)
    found = {stage: count for stage, count in shared.items() if count}
    return Check(
        *name,
        not found,
        f"{len(heldout)} held out; looked at: {', '.join(shared)}"
        if not found
        else ", ".join(f"{count} rows of {stage}" for stage, count in found.items()),
        "dataset.heldout_share and dataset.validation_share must be the same in all stages (upstream.<stage>)",
    )


def memory_fits(config: PPORun, context: Context, actors: Actors) -> Check:
    """The memory plan of what is still to come fits into what is free; base and adapters are there."""
    facts = microbatch.facts_here(config, context)
    found = memory.rank_of(config, facts).device
    phase, need = counted.peak(found)
    there = (counted.PARAMETERS, counted.LIBRARIES)
    need -= sum(item.bytes for item in found if item.kind in there and item.there(phase))
    free = available(context.base.device)
    free_text = "unknown" if free is None else memory.gigabytes(free)
    helps = [
        f"{context.typed(lever.setting)} (saves {memory.gigabytes(lever.saving)})"
        for lever in memory.helps(config, facts)
    ]
    return Check(
        "memory",
        "the memory plan fits",
        free is None or need <= free,
        f"about {memory.gigabytes(need)} more in {phase}, free {free_text}",
        f"set {' or '.join(helps[:2])}" if helps else "choose a smaller model",
    )


def available(device: torch.device) -> float | None:
    """Bytes that can still be had on the device; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return of_host(MEMINFO, CGROUP)
