"""How trials differ: which are one but for the seed, what to call each, and what does not compare."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

from rlhf_exp.evaluation.frontier import by
from rlhf_exp.evaluation.trials import EVAL, HELDOUT, TRAINING, Trial
from rlhf_exp.fields import leaves, walk
from rlhf_exp.schema import RUNS

SEED = re.compile(r"(upstream\.\w+\.)?seed")
# outside the store's key, and yet they say what a run was made of
MADE_OF = re.compile(r"(adapters|dataset\.views|upstream)\..+|model\.(name|path)|dataset\.name")
# what makes a reward or a gold score another scale
SCALES = ("kind", "function", "parts", "ensemble", "ensemble_lambda", "gold")
# who is shown, or what of them; no figure depends on it
SHOWN = ("policies", "samples", "checkpoints", "best", "ema", "greedy")
EVALUATED = ("eval", "generation", "reward_source", "dataset")
EVALUATED_ON = {
    "heldout": "held-out prompts",
    "validation": "validation prompts",
    "train": "evaluated training prompts",  # beside the training curves, which are of such prompts too
}
LABEL_KEYS, LABEL_LENGTH = 3, 60
ABSENT = object()


@dataclass
class Group:
    """Trials whose configs are the same but for the seed."""

    label: str
    trials: list[Trial]

    @property
    def seeds(self) -> list[str]:
        return [str(trial.config.get("seed", "?")) for trial in self.trials]


def settings(trial: Trial) -> dict[str, Any]:
    """The config's leaves that may change a result, and the stage; empty lists and dicts count as leaves."""
    known = _keyed(trial.stage) if trial.stage in RUNS else {}
    return {"stage": trial.stage} | {
        key: value
        for key, value in trial.config.items()
        if known.get(key, not _of_the_machine(key)) or MADE_OF.fullmatch(key)
    }


@cache
def _keyed(stage: str) -> Mapping[str, bool]:
    """Every leaf of a stage's config: whether it can change a result. What a section is, its leaves are."""
    config, found = RUNS[stage](), {}
    out = tuple(
        f"{key}." for key, f, value in walk(config) if is_dataclass(value) and not f.metadata["keyed"]
    )
    for key, f, _ in leaves(config):
        found[key] = f.metadata["keyed"] and not key.startswith(out)
    return found


def _of_the_machine(key: str) -> bool:
    """Of keys that the schema does not know (any more): those that never changed a result."""
    return key.partition(".")[0] in (
        "tracking",
        "strategy",
        "run_name",
        "output_dir",
        "resume",
        "device",
        "threads",
    )


def differences(trials: Sequence[Trial]) -> dict[str, list[Any]]:
    """Key -> the value of each trial (ABSENT where it has no such key), for keys whose values are not all the same.

    Keys that every trial has come first, then those of some stages only.
    """
    configs = [settings(trial) for trial in trials]
    keys = dict.fromkeys(key for config in configs for key in config)
    table = {key: [config.get(key, ABSENT) for config in configs] for key in keys}
    differing = {key: values for key, values in table.items() if any(v != values[0] for v in values[1:])}
    return dict(sorted(differing.items(), key=lambda item: any(v is ABSENT for v in item[1])))


def groups(trials: Sequence[Trial]) -> list[Group]:
    """Trials that differ only by seed together, in order of their coming, each with a name of its own."""
    found = by(trials, lambda trial: repr(sorted(_but_seed(trial).items(), key=lambda item: item[0])))
    members = list(found.values())
    names = labels([group[0] for group in members])
    return [Group(name, group) for name, group in zip(names, members, strict=True)]


def _but_seed(trial: Trial) -> dict[str, Any]:
    config = {key: str(value) for key, value in settings(trial).items() if not SEED.fullmatch(key)}
    if not trial.config:  # nothing is known of it: it is like no other
        config["name"] = trial.name
    return config | {f"data of {view}": print_ for view, print_ in trial.data.items()}


def labels(trials: Sequence[Trial]) -> list[str]:
    """A short name for each: its run_name, else its stage where stages differ, and what few settings differ."""
    nameless = [trial for trial in trials if not trial.run_name]
    differing = differences(nameless)
    places = {id(trial): i for i, trial in enumerate(nameless)}
    short = _short(key for key in differing if key != "stage" and not SEED.fullmatch(key))
    several = len({trial.stage for trial in trials}) > 1
    found = []
    for trial in trials:
        i = places.get(id(trial), 0)
        words = [
            f"{name}={written(values[i])}"
            for key, values in differing.items()
            if (name := short.get(key)) and values[i] is not ABSENT and _common(values, nameless)
        ]
        told = " ".join(words[:LABEL_KEYS])
        label = trial.run_name or " ".join(filter(None, [trial.stage if several or not told else "", told]))
        found.append(label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…")
    counts = by(range(len(found)), lambda i: found[i])
    return [
        label if len(counts[label]) == 1 else f"{label} {trial.key[:6]}"
        for label, trial in zip(found, trials, strict=True)
    ]


def _common(values: Sequence[Any], trials: Sequence[Trial]) -> bool:
    """Whether a key tells trials of one stage apart: a key that only a stage has says no more than the stage."""
    per_stage = by(zip(trials, values, strict=True), lambda pair: pair[0].stage)
    return any(len({written(v) for _, v in pairs}) > 1 for pairs in per_stage.values())


def _short(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, or as many as tell it from the others."""
    keys, found = list(keys), {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if sum(other == name or other.endswith(f".{name}") for other in keys) == 1 or count == len(parts):
                found[key] = name
                break
    return found


def written(value: Any) -> str:
    """A config value as one would type it."""
    if value is ABSENT:
        return "–"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return str(value)


def evaluated_on(trials: Sequence[Trial]) -> str:
    """On what prompts the evaluations were made, in words (dataset.evaluate_on)."""
    found = {
        str(trial.evaluation.get("dataset.evaluate_on", HELDOUT))
        for trial in trials
        if trial.rows.get(HELDOUT)
    } or {HELDOUT}
    return EVALUATED_ON[found.pop()] if len(found) == 1 else "evaluated prompts"


def warnings(trials: Sequence[Trial]) -> list[str]:
    """What does not compare: tasks, evaluations, what was scored."""
    lines = []
    tasks = sorted({" on ".join(trial.task) for trial in trials if trial.config})
    if len(tasks) > 1:
        lines.append(f"These runs are of different tasks, whose scores do not compare: {'; '.join(tasks)}.")
    sources = _values(trials, [f"reward_source.{name}" for name in SCALES])
    lines += [f"Training scores do not compare: {key} is {told}." for key, told in sources.items()]
    lines += _models("Training scores", TRAINING, trials)
    evaluated = [trial for trial in trials if trial.rows.get(HELDOUT) and trial.evaluation]
    keys = dict.fromkeys(key for trial in evaluated for key in trial.evaluation if _tells(key))
    found = _told({key: [trial.evaluation.get(key, ABSENT) for trial in evaluated] for key in keys})
    lines += _models("The evaluations", HELDOUT, evaluated)
    if found:
        told = "; ".join(f"{key} is {said}" for key, said in list(found.items())[:5])
        lines.append(f"The evaluations do not compare: {told}.")
    missing = [trial for trial in trials if not trial.lost and not trial.rows.get(HELDOUT)]
    logged = [trial.name for trial in missing if trial.rows.get(TRAINING)]
    silent = [trial.name for trial in missing if not trial.rows.get(TRAINING)]
    if evaluated and logged:
        lines.append(f"Without an evaluation, so in the training curves only: {', '.join(logged)}.")
    if silent:
        lines.append(
            f"Without a KL in the log and without an evaluation, so in no picture: {', '.join(silent)}."
        )
    return lines


def _tells(key: str) -> bool:
    """Whether evaluations that differ in this key measure something else."""
    section, _, name = key.partition(".")
    if section not in EVALUATED or (section == "eval" and name in SHOWN):
        return False
    return _keyed(EVAL).get(key, True) or key in ("dataset.name", "dataset.views.prompts")


def _models(what: str, source: str, trials: Sequence[Trial]) -> Iterator[str]:
    """Scores of different reward models, each with a scale of its own: with the seed, or between trials of one."""
    known = [trial for trial in trials if source in trial.scorers and not trial.lost]
    for role in dict.fromkeys(role for trial in known for role in trial.scorers[source]):
        having = [trial for trial in known if role in trial.scorers[source]]
        of_seeds = by(having, lambda trial: str(trial.config.get("seed")))
        models = [{trial.scorers[source][role] for trial in group} for group in of_seeds.values()]
        every = sorted(set().union(*models))
        if any(len(some) > 1 for some in models):
            named = _listed([key[:6] for key in every])
            yield f"{what} do not compare: the reward model {role} is {named}, each with a scale of its own."
        elif len(every) > 1:
            yield (
                f"{what} of different seeds are by reward models of their own ({role}), each with its scale: seeds "
                "compare in what no reward model scores."
            )


def _values(trials: Iterable[Trial], keys: Iterable[str]) -> dict[str, str]:
    trials = list(trials)
    return _told({key: [t.config[key] for t in trials if key in t.config] for key in keys})


def _told(table: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """`a, b and c` for the keys with several values."""
    found = {}
    for key, values in table.items():
        names = list(dict.fromkeys(written(value) for value in values))
        if len(names) > 1:
            found[key] = _listed(names)
    return found


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}"
