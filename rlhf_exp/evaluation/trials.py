"""What a report compares: run folders read as trials, each with its checkpoints' figures, samples and config.

A trial is a run that trained a policy (any stage but those of NO_POLICY). Its points come from two sources that are
never mixed, for one is of held-out prompts and the other of the prompts that it trained on: the evaluations whose
parent it is (eval.json), and its own training curve (metrics.jsonl). An evaluation whose policy is not among the
inputs is a trial itself. Nothing is loaded, nothing verified, and a run may be unfinished.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_exp.schema import GOLD, member_of
from rlhf_exp.store.frozen import CONFIG
from rlhf_exp.store.listing import CORRUPT, EMPTY, Entry
from rlhf_exp.store.manifest import RECORD
from rlhf_exp.store.show import read_config
from rlhf_exp.tracking import read_metrics

HELDOUT, TRAINING = "heldout", "training"  # sources
NO_POLICY = ("sft", "reward", "probe", "prefer", "export", "report", "pipeline")
EVAL, EVALUATION, METRICS, SAMPLES = "eval", "eval.json", "metrics.jsonl", "samples.jsonl"
LOST = ("FAILED", CORRUPT, EMPTY)  # states whose points are not shown: what they are worth is not known
# of the models' own distributions, where the sampler's are others: the x-axis, whatever was sampled
OWN_KL = "objective/kl_untruncated"
LOGGED = {"kl": "objective/kl", "reward": "objective/scores", "gold": "objective/gold"}  # in training curves
TEXT = 4000  # characters of a sample that a page holds


@dataclass
class Row:
    """A policy and its figures.

    step: its place on its line: of training, 0 at the start; the n of best-of-n, the beta of ilql's decoding; None
    for an average. bound: its KL is an upper bound, not a measurement.
    """

    name: str
    step: float | None
    metrics: dict[str, float]
    bound: bool = False

    @property
    def is_start(self) -> bool:
        """Whether it is what training began at."""
        return self.step == 0 and self.metrics.get("kl") == 0


@dataclass
class Sample:
    """Answers to one prompt: who -> {"text", "reward", "gold", "ended"}."""

    prompt: str
    answers: dict[str, dict[str, Any]]


@dataclass
class Trial:
    """One training and what is known of its policies."""

    name: str  # stage/folder
    stage: str
    key: str
    state: str
    path: str
    reason: str = ""  # why it failed or cannot be read, one line
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # view -> fingerprint
    rows: dict[str, list[Row]] = field(default_factory=dict)  # source -> policies, by step
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # source -> prompts
    evaluation: dict[str, Any] = field(default_factory=dict)  # the evaluation's config
    scorers: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # source -> role -> key of a reward model
    run_name: str | None = None
    digest: str = ""  # of all that was read

    @property
    def lost(self) -> bool:
        return self.state in LOST

    def last(self, source: str) -> Row | None:
        """The last policy of a source; an average only where there is nothing else but the start."""
        rows = self.rows.get(source, [])
        placed = [row for row in rows if row.step is not None]
        ends = (
            [row for row in placed if not row.is_start] or [row for row in rows if row.step is None] or placed
        )
        return ends[-1] if ends else None

    @property
    def task(self) -> tuple[str, str]:
        """(model, dataset) by name."""
        return tuple(str(self.config.get(f"{part}.name", "?")) for part in ("model", "dataset"))


def read(entries: Iterable[Entry], samples: int = 20) -> tuple[list[Trial], list[str]]:
    """Trials of run folders in their order, and what to be told of. samples: prompts kept for each source."""
    entries = [e for e in entries if e.stage not in NO_POLICY]
    trained = [_trained(e, samples) for e in entries if e.stage != EVAL]
    known = {trial.key: trial for trial in trained if trial.state != CORRUPT}
    # an adapter that was given (adapters.ppo=RUN) has a key of its own
    known |= {os.path.realpath(trial.path): trial for trial in known.values()}
    alone: list[Trial] = []
    notes: list[str] = []
    shown: dict[str, Entry] = {}
    # the newest last: it counts
    for e in sorted(
        (e for e in entries if e.stage == EVAL), key=lambda e: e.when.timestamp() if e.when else 0
    ):
        parents = policies_of(e, known)
        found = _evaluation(e, samples)
        if isinstance(found, str):
            own = [known[key] for key in parents.values() if key in known]
            if own:
                notes.append(f"{e.name} ({e.state.lower()}), the evaluation of {own[0].name}: {found}.")
            else:
                alone.append(replace(_trial(e), reason=_reason(e) or found))
            continue
        parts = by_run(found, parents)
        for who, part in parts.items():
            trial = None if who in found.apart else known.get(parents.get(found.roles.get(who, who), ""))
            if trial is None:
                trial = _trial(e)
                if len(parts) > 1 or len(parents) > 1 or who in found.apart:
                    apart(trial, who)
                alone.append(trial)
            elif trial.name in shown:
                older = shown[trial.name].name
                notes.append(f"{trial.name} was evaluated more than once: {e.name} is shown, not {older}.")
            shown[trial.name] = e
            if who == found.roles.get(who) and who != trial.stage:
                trial.run_name = trial.run_name or who  # rloo, which is of stage ppo
            trial.rows[HELDOUT], trial.samples[HELDOUT] = part.rows, part.samples
            trial.evaluation, trial.scorers[HELDOUT] = read_config(e), _scorers(e)
            both = trial.digest + _digest(e.path, (EVALUATION, CONFIG))
            trial.digest = hashlib.sha256(both.encode()).hexdigest()
    return trained + alone, notes


def apart(trial: Trial, who: str) -> None:
    """Make the trial of an evaluation that of one of its policies: each is a trial."""
    trial.name, trial.path = f"{trial.name}:{who}", f"{trial.path}#{who}"
    trial.run_name = trial.config["policy"] = who


def policies_of(e: Entry, known: Container[str]) -> dict[str, str]:
    """Role -> the run whose policy an evaluation looked at: its folder if that is known, else its key."""
    found = {}
    for role, parent in e.inputs["parents"].items():
        if parent.get("stage") not in NO_POLICY:
            path = os.path.realpath(e.path / str(parent.get("path")))
            found[role] = path if path in known else str(parent.get("key"))
    return found


class Evaluated(NamedTuple):
    """What an evaluation measured. runs: of each row, which run's policy it is; "" for the start."""

    rows: list[Row]
    samples: list[Sample]
    runs: list[str]
    roles: Mapping[str, str]  # of these runs among the evaluation's parents, where it says so
    apart: frozenset[str]  # those that no run trained: best-of-n of some policy


def by_run(found: Evaluated, parents: Mapping[str, str]) -> dict[str, Evaluated]:
    """Role or name -> its part of an evaluation of several runs; the start belongs to each."""
    runs = found.runs
    if len(parents) < 2:
        own = next(iter(parents), "")
        if not found.apart:
            return {own: found._replace(rows=_placed(found.rows))}
        runs = [run if run in found.apart or not run else own or "policies" for run in runs]
    parts = {}
    for who in dict.fromkeys(run for run in runs if run):
        rows = [row for row, run in zip(found.rows, runs, strict=True) if run in ("", who)]
        rows = _placed(rows)
        names = {row.name for row in rows}
        samples = [
            Sample(s.prompt, {name: answer for name, answer in s.answers.items() if name in names})
            for s in found.samples
        ]
        parts[who] = Evaluated(rows, samples, [], {}, frozenset())
    return parts


def _placed(rows: list[Row]) -> list[Row]:
    """The only policy of a run has a place on its line, so that seeds can be joined: it is where training ended."""
    ends = [row for row in rows if not row.is_start]
    if len(ends) != 1 or ends[0].step is not None:
        return rows
    return [replace(row, step=1.0) if row is ends[0] else row for row in rows]


def _run_of(policy: Mapping[str, Any]) -> str:
    """`run` or `role`, which an evaluation of several gives; else the name without its step: ppo of ppo@8."""
    if policy.get("step") == 0 and policy["metrics"].get("kl") == 0:
        return ""
    return str(
        policy.get("run") or policy.get("role") or re.sub(r"(@\d+| \(\w+\))+$", "", str(policy["name"]))
    )


def _trial(e: Entry) -> Trial:
    config = read_config(e)
    found = Trial(e.name, e.stage, e.key, e.state, str(e.path), _reason(e), config, e.inputs["data"])
    found.run_name = config.get("run_name")
    found.digest = _digest(e.path, (RECORD, CONFIG, METRICS, EVALUATION), e.state)
    return found


def _scorers(e: Entry) -> dict[str, str]:
    """The reward models that a run scored by, gold included: role -> key."""
    parents = e.inputs["parents"].items()
    return {role: str(p.get("key")) for role, p in parents if member_of(role) is not None or role == GOLD}


def _reason(e: Entry) -> str:
    """The last line of what went wrong."""
    text = e.problem or e.record.get("error") or ("no run.json" if e.state == EMPTY else "")
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _digest(path: Path, names: Iterable[str], *more: str) -> str:
    """Of the content of files; one that is not there counts as empty."""
    hasher = hashlib.sha256("\0".join(more).encode())
    for name in names:
        file = path / name
        hasher.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return hasher.hexdigest()


def _trained(e: Entry, samples: int) -> Trial:
    found = _trial(e)
    if found.lost:
        return found
    try:
        curve = read_metrics(e.path / METRICS)
    except (OSError, ValueError) as error:
        found.state, found.reason = CORRUPT, f"{METRICS} cannot be read ({error})"
        return found
    found.rows[TRAINING], found.scorers[TRAINING] = rows_of_curve(curve, e.stage), _scorers(e)
    found.samples[TRAINING] = _logged_samples(e, samples)
    return found


def rows_of_curve(curve: Iterable[Mapping[str, Any]], stage: str) -> list[Row]:
    """Lines of metrics.jsonl as rows: those that have a KL; `kl`, `reward` and `gold` are names for LOGGED's."""
    rows = []
    for line in curve:
        figures = _numbers(line)
        step = figures.pop("step", None)
        figures |= {name: figures[key] for name, key in LOGGED.items() if key in figures}
        figures |= {"kl": figures[OWN_KL]} if OWN_KL in figures else {}
        if "kl" in figures and step is not None:
            rows.append(Row(f"{stage}@{step:g}", step, figures))
    return sorted(rows, key=lambda row: row.step)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _evaluation(e: Entry, samples: int) -> Evaluated | str:
    """Figures by step, and samples; or in words why there are none."""
    if e.state in LOST or not (e.path / EVALUATION).is_file():
        return "it has no figures"
    try:
        return parsed(json.loads((e.path / EVALUATION).read_text(encoding="utf-8")), samples)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{EVALUATION} cannot be read ({type(error).__name__}: {error})"


def parsed(content: Mapping[str, Any], samples: int) -> Evaluated:
    """The content of eval.json. Raises KeyError, TypeError or AttributeError for what is no such content."""
    policies = content["policies"]
    pairs = [
        (Row(str(p["name"]), _place(p), _numbers(p["metrics"]), "kl" in p.get("bounds", ())), _run_of(p))
        for p in policies
    ]
    roles = {_run_of(p): str(p["role"]) for p in policies if p.get("role")}
    chosen = frozenset(_run_of(p) for p in policies if p.get("best_of"))
    shown = [
        Sample(
            _cut(sample["prompt"]),
            {str(name): _answer(answer) for name, answer in sample["responses"].items()},
        )
        for sample in (content.get("samples") or [])[:samples]
    ]
    pairs.sort(key=lambda pair: (math.inf if pair[0].step is None else pair[0].step, not pair[0].is_start))
    return Evaluated([row for row, _ in pairs], shown, [run for _, run in pairs], roles, chosen)


def _place(policy: Mapping[str, Any]) -> float | None:
    """The step of a policy in eval.json, or what takes its place on a line."""
    values = (_step(policy.get(name)) for name in ("step", "best_of", "beta"))
    return next((value for value in values if value is not None), None)


def _step(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= TEXT else text[:TEXT] + " …"


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    found = {"text": _cut(answer.get("text") or ""), "ended": answer.get("ended")}
    scores = {key: answer.get(key) for key in ("reward", "gold")}
    return found | {key: v for key, v in scores.items() if _step(v) is not None and math.isfinite(v)}


def _logged_samples(e: Entry, most: int) -> list[Sample]:
    """The samples of the last step that logged any (samples.jsonl)."""
    from rlhf_exp.tracking import read_lines

    try:
        lines = list(read_lines(e.path / SAMPLES))
    except (OSError, ValueError):
        return []
    last = [line for line in lines if line.get("step") == lines[-1].get("step")][:most]
    found = []
    for line in last:
        if "prompt" not in line or "response" not in line:
            continue
        answer = {"text": line["response"], "reward": line.get("score"), "ended": line.get("ended")}
        answer["gold"] = line.get("gold")
        found.append(Sample(_cut(line["prompt"]), {f"{e.stage}@{line.get('step')}": _answer(answer)}))
    return found
