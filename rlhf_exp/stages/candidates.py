"""Which policies an evaluation looks at: SFT and what PPO kept, or what eval.policies names (policies.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_exp.errors import InputError
from rlhf_exp.schema import EvalRun, Evaluation
from rlhf_exp.stages.actions import BEST
from rlhf_exp.stages.actors import EMA
from rlhf_exp.stages.context import ADAPTER, CHECKPOINTS, MODEL, Context, adapter_folder
from rlhf_exp.stages.policies import (
    PLAIN,
    STAGED,
    STEP,
    STEPPED,
    Entry,
    entries,
    names,
    record_of,
    run_name,
    run_of,
    step_of,
)
from rlhf_exp.stages.steering import heads_file
from rlhf_exp.tracking import read_metrics

SFT, KEPT, LAST = "sft", "kept", "last"  # kinds; those of which there is one are groups of metrics too
AVERAGE, CHOSEN = "ema", "best"
OTHER = "other"  # of eval.policies, and no checkpoint of a PPO run


@dataclass
class Candidate:
    """A policy to look at: its adapter's folder, None for the plain base."""

    name: str
    step: int  # of PPO, 0 before it
    adapter: Path | None
    kind: str = KEPT
    run: str = ""  # which of several runs it is a checkpoint of
    role: str = ""  # of the run in the plan, where eval.policies names it
    best_of: int = 1  # answers sampled, of which the one with the highest reward counts
    beta: float | None = None  # of ilql's decoding by beta (Q - V)
    heads: Path | None = None  # the run that Q and V are from
    of_sft: bool = False  # whether the answers that best_of chooses from are the SFT policy's

    @property
    def on_path(self) -> bool:
        """Whether the policy itself was here at `step`; an average over many steps never was."""
        return self.kind not in (AVERAGE, OTHER)


def candidates(config: EvalRun, context: Context) -> list[Candidate]:
    """The policies of an evaluation, in order. InputError for a step that was not kept, or one that comes twice."""
    return listed(config.eval, context.parents, made_by_sft(context.base.path))


def listed(evaluation: Evaluation, parents: Mapping[str, Path], sft_base: bool) -> list[Candidate]:
    """parents: role -> run folder or PEFT folder; sft_base: whether the base itself is what sft made."""
    if evaluation.policies:
        called = names(evaluation, parents)
        read = entries(evaluation)
        found = [
            c for entry in read for c in of_entry(evaluation, entry, called[entry.place], parents, sft_base)
        ]
        require_different(found)
        return found
    sft = _adapter("sft", parents)
    found = [Candidate(SFT if sft or sft_base else PLAIN, 0, sft, SFT)]
    return found + (of_run(evaluation, parents["ppo"], "ppo") if "ppo" in parents else [])


def of_entry(
    evaluation: Evaluation, entry: Entry, name: str, parents: Mapping[str, Path], sft_base: bool
) -> Iterator[Candidate]:
    """The policies that an entry names, called `name`; parents and sft_base as in `listed`, the entry's own at least.

    InputError for a step that was not kept, for Q and V that are not there.
    """
    for found in _plainly(evaluation, entry, name, parents, sft_base):
        found.role = entry.role or ""
        yield _decoded(found, entry, parents) if entry.how else found


def _decoded(plain: Candidate, entry: Entry, parents: Mapping[str, Path]) -> Candidate:
    """A policy that is decoded in another way than by plain samples: it never was what trained."""
    heads = None if entry.beta is None else parents[entry.role]
    if heads is not None and not heads_file(heads).is_file():
        raise InputError(f"{entry.key}={entry.text}: {heads} holds no Q and V: it is no run of ilql")
    own = entry.name is not None
    found = replace(
        plain,
        name=plain.name if own else plain.name + entry.how,
        kind=OTHER,
        beta=entry.beta,
        heads=heads,
        run=plain.run or plain.name,
    )
    if entry.best_of is None:
        return found
    # what differs in n alone is one line of a report
    group = plain.name if own else found.name.removesuffix(f"_{entry.best_of}")
    return replace(found, best_of=entry.best_of, of_sft=plain.kind == SFT, run=group)


def _plainly(
    evaluation: Evaluation, entry: Entry, name: str, parents: Mapping[str, Path], sft_base: bool
) -> Iterator[Candidate]:
    """The policies that an entry names, without regard to how they are decoded."""
    sft = _adapter("sft", parents)
    if entry.who == PLAIN or (entry.who == SFT and sft is None):
        if entry.who == PLAIN and sft_base:
            raise InputError(
                f"{entry.key}={entry.text}: sft has trained all weights, so that the plain base is not here: "
                "leave it out"
            )
        name = SFT if sft_base and entry.name is None else name
        yield Candidate(name, 0, None, SFT if sft is None else OTHER)
    elif entry.who == SFT:
        yield Candidate(name, 0, sft, SFT)
    else:
        yield from _of_folder(evaluation, entry, parents[entry.role], name)


def _of_folder(evaluation: Evaluation, entry: Entry, folder: Path, name: str) -> Iterator[Candidate]:
    """A run of PPO has checkpoints, of which `WHO@STEP` wants one; what else has an adapter is one policy."""
    kept = {step_of(path): path for path in sorted((folder / CHECKPOINTS).glob(f"{STEP}*"))}
    ppo = entry.who in STEPPED or bool(kept) or record_of(folder).get("stage") == "ppo"
    whole, step = run_of(folder)
    run = "" if entry.who in STAGED else run_name(whole)
    if entry.step is not None:
        kept.setdefault(last_step(folder), adapter_folder(folder))
        if entry.step not in kept or not ppo:
            there = ", ".join(str(step) for step in sorted(kept)) if ppo else "none, it is no PPO run"
            raise InputError(
                f"{entry.key}={entry.text}: step {entry.step} was not kept (ppo.save_every); kept steps: {there}"
            )
        said = name if entry.name is not None else f"{name}@{entry.step}"
        yield Candidate(said, entry.step, kept[entry.step], KEPT, run)
    elif step is not None:
        yield Candidate(name, step, folder, KEPT, run)
    elif ppo and entry.name is None and not entry.how:
        yield from (replace(c, run=run) for c in of_run(evaluation, folder, name))
    elif ppo:  # one name, one policy
        yield Candidate(name, last_step(folder), adapter_folder(folder), KEPT, run)
    else:
        yield Candidate(name, 0, adapter_folder(folder), OTHER)


def require_different(found: list[Candidate]) -> None:
    """Neither a name nor a policy twice."""
    by_name: dict[str, Candidate] = {}
    by_adapter: dict[object, Candidate] = {}
    for candidate in found:
        place = candidate.adapter and candidate.adapter.resolve()
        policy = (place, candidate.beta or 0, candidate.best_of)
        if (other := by_adapter.setdefault(policy, candidate)) is not candidate:
            raise InputError(
                f"eval.policies names a policy twice, as {other.name} and as {candidate.name}"
                + (f" ({place})" if place else "")
            )
        if by_name.setdefault(candidate.name, candidate) is not candidate:
            raise InputError(
                f"eval.policies calls two policies {candidate.name}: give one a name of its own, 'NAME=WHO'"
            )


def of_run(evaluation: Evaluation, folder: Path, name: str) -> list[Candidate]:
    """What a PPO run kept, in order of its step, the average, the last adapter."""
    found, end = kept_of(evaluation, folder, name), last_step(folder)
    if evaluation.ema and (folder / EMA).is_dir():
        found.append(Candidate(f"{name} (ema)", end, folder / EMA, AVERAGE))
    return [*found, Candidate(f"{name}@{end}", end, adapter_folder(folder), LAST)]


def last_step(run: Path) -> int:
    """How many iterations a PPO run had; a PEFT folder does not say, so 1."""
    curves = read_metrics(run / "metrics.jsonl")
    return int(curves[-1]["step"]) if curves else 1


def kept_of(evaluation: Evaluation, ppo: Path, name: str) -> list[Candidate]:
    """The kept adapters of a PPO run that are looked at; the best of the run is called that."""
    best = best_of(ppo) if evaluation.best else None
    folders = sorted((ppo / CHECKPOINTS).glob(f"{STEP}*")) if evaluation.checkpoints else []
    if best is not None and best not in folders:
        folders.append(best)
    found = []
    for folder in folders:
        step = int(folder.name.removeprefix(STEP))
        said, kind = (f"{name} (best: step {step})", CHOSEN) if folder == best else (f"{name}@{step}", KEPT)
        found.append(Candidate(said, step, folder, kind))
    return found


def best_of(ppo: Path) -> Path | None:
    """The kept adapter that best.json names; None if that is the last one, or there is no such file."""
    path = ppo / BEST
    if not path.is_file():
        return None  # a PEFT folder
    name = json.loads(path.read_text())["adapter"]
    return None if name == ADAPTER or not (ppo / name).is_dir() else ppo / name


def reference_of(evaluation: Evaluation, found: list[Candidate]) -> int:
    """The place of the policy that win rates are against. InputError where eval.against names none of them."""
    called = [candidate.name for candidate in found]
    if evaluation.against is None:
        return called.index(SFT) if SFT in called else 0
    if evaluation.against not in called:
        raise InputError(
            f"eval.against={evaluation.against}: no policy of this evaluation is called that; there are "
            f"{', '.join(called)}"
        )
    return called.index(evaluation.against)


def _adapter(role: str, parents: Mapping[str, Path]) -> Path | None:
    return adapter_folder(parents[role]) if role in parents else None


def made_by_sft(folder: Path) -> bool:
    """Whether a base is what the sft stage made of all weights (lora.full): sft/<key>/model."""
    return folder.name == MODEL and folder.parent.parent.name == "sft"
