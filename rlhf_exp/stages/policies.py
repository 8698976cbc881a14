"""What eval.policies names: policies of stages, folders, MLflow runs, one step of a run; and their names. No torch.

sft  base  ppo  rloo  dpo  kto  rft  ilql   of a stage of the plan; the plain base
FOLDER  runs:/ID/adapter                    a run folder or a PEFT folder
WHO@STEP                                    one kept adapter of a PPO run
WHO:best_of_16                              the best of 16 answers of this policy, by the reward
WHO:beta_4                                  of a run of ilql: decoding by 4 (Q - V)
NAME=WHO                                    shown under this name
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf_exp.errors import InputError
from rlhf_exp.fields import did_you_mean
from rlhf_exp.rewards import judge, relevance
from rlhf_exp.schema import COMPARED, RLOO, TRAINED, EvalRun, Evaluation, Run, Tracking
from rlhf_exp.stages import adapters
from rlhf_exp.stages.context import ADAPTER, CHECKPOINTS, HEAD_FILE, HEADS_FILE, ILQL
from rlhf_exp.store.manifest import RECORD

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Node

PLAIN = "base"  # the plain base
STEPPED = ("ppo", RLOO)  # those that keep adapters of their steps
STAGED = ("sft", *TRAINED, RLOO, ILQL)  # policies of stages of the plan
STEP = "step_"  # folders of kept adapters: checkpoints/step_00008
NAMED = re.compile(r"(?P<name>[^/=:@\[\]]+)=(?P<rest>.+)")
ONE_STEP = re.compile(r"(?P<who>.+)@(?P<step>\d+)")
BEST_OF = re.compile(r"(?P<who>.+):best_of_(?P<n>\d+)")
BETA = re.compile(r"(?P<who>.+):beta_(?P<beta>\d+(?:\.\d+)?)")


class Entry(NamedTuple):
    """One of eval.policies, read."""

    place: int
    text: str
    name: str | None
    who: str  # PLAIN, one of STAGED, a folder or a URI
    step: int | None
    best_of: int | None = None
    beta: float | None = None

    @property
    def how(self) -> str:
        """How it is decoded, as it is written; "" for plain samples."""
        beta = "" if self.beta is None else f":beta_{self.beta:g}"
        return beta + ("" if self.best_of is None else f":best_of_{self.best_of}")

    @property
    def key(self) -> str:
        return f"eval.policies[{self.place}]"

    @property
    def role(self) -> str | None:
        """Under which its run is a parent of the evaluation; None for the plain base."""
        if self.who == PLAIN:
            return None
        return self.who if self.who in STAGED else f"{COMPARED}{self.place}"


def entries(evaluation: Evaluation) -> list[Entry]:
    """eval.policies, read; nothing of it is looked for."""
    return [_entry(place, text.strip()) for place, text in enumerate(evaluation.policies)]


def _entry(place: int, text: str) -> Entry:
    name, who, step = None, text, None
    if found := NAMED.fullmatch(who):
        name, who = found["name"].strip(), found["rest"].strip()
    best_of, beta = None, None
    if (found := BEST_OF.fullmatch(who)) and not _there(who):
        who, best_of = found["who"], int(found["n"])
    if (found := BETA.fullmatch(who)) and not _there(who):
        who, beta = found["who"], float(found["beta"])
    if (found := ONE_STEP.fullmatch(who)) and not _there(who):
        who, step = found["who"], int(found["step"])
    return Entry(place, text, name, who, step, best_of, beta)


def _there(who: str) -> bool:
    """Whether this is a folder of that very name."""
    return Path(who).expanduser().is_dir()


def roles(evaluation: Evaluation) -> tuple[str, ...]:
    """The roles of what is evaluated, besides sft, which all are measured from."""
    if not evaluation.policies:
        return ("ppo",)
    return tuple(
        dict.fromkeys(role for entry in entries(evaluation) if (role := entry.role) not in (None, "sft"))
    )


def locate(role: str, config: EvalRun, tracking: Tracking, output_dir: str) -> tuple[Path, str]:
    """The folder of a role that eval.policies gives, and the config key that does. InputError where there is none."""
    entry = entries(config.eval)[int(role.removeprefix(COMPARED))]
    known = (PLAIN, *STAGED)
    if not entry.who.startswith("runs:/") and "/" not in entry.who and not Path(entry.who).is_dir():
        hint = (
            did_you_mean(entry.who, known) or f"; choose {', '.join(known)}, a folder, or runs:/ID/{ADAPTER}"
        )
        raise InputError(f"{entry.key}={entry.text}: there is no such policy or folder{hint}")
    stage = "ppo" if entry.beta is None else ILQL
    folder = adapters.locate(stage, entry.who, tracking, output_dir, entry.key)
    record = record_of(folder)
    if record.get("stage") == "reward" or (not record and (folder / HEAD_FILE).is_file()):
        raise InputError(f"{entry.key}={entry.text} is a reward model, which answers nothing: name a policy")
    with_q = record.get("stage") == ILQL or (folder / ILQL / HEADS_FILE).is_file()
    if with_q and entry.beta is None:
        raise InputError(
            f"{entry.key}={entry.text} is a run of ilql, which decodes by beta (Q - V): say by which beta, "
            f"{entry.text}:beta_4 (beta_0: its policy without Q)"
        )
    if entry.beta is not None and not (folder / ILQL / HEADS_FILE).is_file():
        raise InputError(
            f"{entry.key}={entry.text}: beta is of a run of ilql, this has no Q: leave :beta_{entry.beta:g} out"
        )
    return folder, entry.key


def names(evaluation: Evaluation, folders: Mapping[str, Path]) -> dict[int, str]:
    """What each entry is called, by its place, without step and `how`; folders: of the roles that are given.

    Two never have one name.
    """
    read = entries(evaluation)
    found = {entry.place: name_of(entry, folders.get(entry.role or "")) for entry in read}
    shown = [(found[entry.place], entry.step, entry.how) for entry in read]
    for entry in read:
        if shown.count(shown[entry.place]) > 1 and entry.name is None and entry.role not in (None, *STAGED):
            found[entry.place] += f" ({entry.who})"
    return found


def name_of(entry: Entry, folder: Path | None) -> str:
    """Its own name, the stage's, that of the run (stage and key) it is of, else its folder's; without a step."""
    if entry.name is not None or entry.role is None or entry.role in STAGED or folder is None:
        return entry.name or entry.who
    if entry.who.startswith("runs:/"):
        return f"run {entry.who.removeprefix('runs:/')[:8]}"
    run, kept = run_of(folder)
    return run_name(run) + ("" if kept is None else f"@{kept}")


def run_of(folder: Path) -> tuple[Path, int | None]:
    """The run folder that a folder is, or is part of, and the step of a kept adapter."""
    path = folder.resolve()
    kept = step_of(path) if path.parent.name == CHECKPOINTS else None
    return (path.parent.parent if kept is not None else path.parent if path.name == ADAPTER else path), kept


def run_name(run: Path) -> str:
    """Stage and key of a run folder, else the folder's name."""
    record = record_of(run)
    return f"{record['stage']} {record['key'][:6]}" if record.get("key") else run.name


def record_of(run: Path) -> dict[str, str]:
    """stage and key of a run folder; {} where it is none."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        return {name: str(record[name]) for name in ("stage", "key")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def step_of(folder: Path) -> int | None:
    """The step of a kept adapter's folder."""
    number = folder.name.removeprefix(STEP)
    return int(number) if folder.name.startswith(STEP) and number.isdigit() else None


def fingerprints(evaluation: Evaluation, folders: Mapping[str, Path]) -> dict[str, str]:
    """What of eval.policies decides the result besides the parents' content: who, which step, which name."""
    called = names(evaluation, folders)
    return {
        entry.key: f"{entry.role} {'' if entry.step is None else entry.step} {called[entry.place]}{entry.how}"
        for entry in entries(evaluation)
    }


def contents(config: Run, nodes: Mapping[str, Node]) -> dict[str, str]:
    """{key: fingerprint} of what an evaluation reads and its config does not say: for the store key."""
    if not isinstance(config, EvalRun):
        return {}
    given = {name: node.given for name, node in nodes.items() if node.given is not None}
    found = fingerprints(config.eval, given)
    if config.eval.encoder is not None:
        try:
            found["eval.encoder"] = relevance.fingerprint(config.eval.encoder)
        except InputError as error:
            raise InputError(
                [f"eval.encoder={config.eval.encoder}: {line}" for line in error.problems]
            ) from error
    if config.eval.judge == "model" and config.judge.model:
        found["judge.model"] = judge.fingerprint(config.judge, "own base")
    return found


def problems(evaluation: Evaluation) -> list[str]:
    """What is wrong with the words alone, a line each."""
    found, read = [], entries(evaluation)
    for entry in read:
        if not entry.who or entry.who.startswith("="):
            found.append(f"{entry.key}={entry.text!r} names no policy: leave it out")
        elif entry.name == "data":
            found.append(
                f"{entry.key}={entry.text}: data is the row of the data's own answers: choose another name"
            )
        elif entry.step is not None and entry.who in (PLAIN, *(s for s in STAGED if s not in STEPPED)):
            found.append(
                f"{entry.key}={entry.text}: only PPO keeps adapters of its steps: leave @{entry.step} out"
            )
        elif entry.best_of is not None and entry.best_of < 2:
            found.append(
                f"{entry.key}={entry.text}: the best of {entry.best_of} is of two answers at least: leave "
                f":best_of_{entry.best_of} out"
            )
        elif entry.who == ILQL and entry.beta is None:
            found.append(
                f"{entry.key}={entry.text}: ilql decodes by beta (Q - V): say by which beta, {entry.text}:beta_4"
            )
        elif entry.beta is not None and entry.who in (PLAIN, *(s for s in STAGED if s != ILQL)):
            found.append(f"{entry.key}={entry.text}: beta is of ilql: leave :beta_{entry.beta:g} out")
    for what, value in (
        ("policy", lambda entry: (entry.who, entry.step, entry.how)),
        ("name", lambda entry: entry.name),
    ):
        values = [value(entry) for entry in read]
        twice = [e.text for e in read if value(e) is not None and values.count(value(e)) > 1]
        if twice:
            found.append(f"eval.policies has the same {what} twice: {', '.join(twice)}")
    return found
