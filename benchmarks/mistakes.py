"""The variants of the post-mortem, each with one published mistake, and what is read of their runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_exp.evaluation import outcome
from rlhf_exp.evaluation.figures import moving_average
from rlhf_exp.tracking import read_lines, read_metrics

SOUND = "sound"
END = 6  # last iterations whose mean is a run's end value: one batch is noisy
GUARDS, METRICS, SAMPLES, RECORD = "guards.jsonl", "metrics.jsonl", "samples.jsonl", "run.json"
# what a run prints: its self-check, and what the gate says of the reward model's probes (docs/probes.md)
CHECK = re.compile(r"^(ok|note|FAIL|\(off\)) +(.+?) \(")
GATE = re.compile(r"^gate: reward \w+(?: scores too many of these above the real answer)?: (.+)$")
PROBE = re.compile(r"(\w+) [\d.]+ \(limit ")


class Variant(NamedTuple):
    """One run of the recipe: its title, what is set for it, and whether its proxy has the sound run's scale."""

    title: str
    overrides: tuple[str, ...] = ()
    same_score: bool = True


VARIANTS = {
    SOUND: Variant("Sound"),
    "wrong_reference": Variant("Wrong reference", ("ppo.faults=[wrong_reference]",)),
    "whiten_per_answer": Variant("Whitened per answer", ("ppo.faults=[whiten_per_minibatch]",)),
    "no_eos_in_data": Variant(
        "No EOS in reward data", ("upstream.reward.reward.faults=[answers_without_eos]",), same_score=False
    ),
    "sigmoid": Variant("Sigmoid on the score", ("ppo.faults=[sigmoid_scores]",), same_score=False),
    "not_replayed": Variant("Sampler not replayed", ("generation.logprob_mode=raw",)),
    # as published: neither the reward model's data nor what it scores has an EOS
    "no_eos_at_all": Variant(
        "No EOS at all",
        ("upstream.reward.reward.faults=[answers_without_eos]", "ppo.faults=[score_without_eos]"),
        same_score=False,
    ),
}
DEFAULT = tuple(VARIANTS)[:6]  # the five, beside the sound run


class Metric(NamedTuple):
    key: str
    label: str
    unit: str
    spec: str
    shared: bool  # whether all variants are drawn on one scale
    guards: tuple[str, ...] = ()  # those that watch it


METRICS_SHOWN = (
    Metric("response/length_mean", "length", "tokens", ".1f", True, ("length", "empty")),
    Metric("objective/kl", "KL", "nats an answer, to its reference", ".1f", False, ("kl",)),
    Metric("objective/scores", "proxy", "mean score by the reward model", ".2f", False),
    Metric("objective/gold", "gold", "mean sentiment, -1 to 1, not trained on", ".2f", True, ("hacking",)),
)


@dataclass(frozen=True)
class Trial:
    """A finished run: its metrics by iteration, rows of guards and samples, and what it printed of its checks."""

    variant: str
    seed: int
    rows: Sequence[Mapping[str, Any]]
    guards: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    checks: Mapping[str, str]  # of the self-check: title -> ok, note, FAIL, (off)
    probes: Sequence[str] | None  # of the reward model: those above their limits; None: nothing was said
    seconds: float

    def values(self, key: str) -> np.ndarray:
        """The metric of every iteration, nan where it is not there."""
        found = (outcome.number(row, key) for row in self.rows)
        return np.array([np.nan if value is None else value for value in found])

    def end(self, key: str) -> float:
        """Mean over the last END iterations."""
        return float(self.values(key)[-END:].mean())

    def fired(self) -> dict[str, int]:
        """Guard -> the first iteration in which it fired."""
        first: dict[str, int] = {}
        for row in self.guards:
            first.setdefault(row["guard"], row["step"])
        return first


def read(variant: str, seed: int, folder: Path, log: Path) -> Trial:
    """A run's files; `log` is what it printed, the only place where the checks' lines are."""
    guards, samples = (
        list(read_lines(folder / name)) if (folder / name).is_file() else [] for name in (GUARDS, SAMPLES)
    )
    printed = log.read_text(encoding="utf-8") if log.is_file() else ""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    rows = read_metrics(folder / METRICS)
    said, seconds = (dict(checks(printed)), probes(printed)), record.get("seconds") or 0.0
    return Trial(variant, seed, rows, guards, samples, *said, seconds)


def checks(printed: str) -> Iterator[tuple[str, str]]:
    """(title, state) of each line of the self-check; a run that was continued has them again, the same."""
    for line in printed.splitlines():
        if found := CHECK.match(line):
            yield found[2], found[1]


def probes(printed: str) -> list[str] | None:
    """The probes above their limits in the gate's last line; None without such a line."""
    found = [line[1] for line in map(GATE.match, printed.splitlines()) if line]
    return PROBE.findall(found[-1]) if found else None


class Band(NamedTuple):
    """A metric of several seeds: each smoothed as the report does it, their mean, least and most; [iterations]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(trials: Sequence[Trial], key: str) -> Band:
    """Over the iterations that all of them have."""
    length = min(len(trial.rows) for trial in trials)
    curves = np.array([moving_average(trial.values(key)[:length]) for trial in trials])
    return Band(np.arange(1, length + 1), curves.mean(axis=0), curves.min(axis=0), curves.max(axis=0))


def of(trials: Sequence[Trial], variant: str) -> list[Trial]:
    """A variant's, by seed."""
    return sorted((trial for trial in trials if trial.variant == variant), key=lambda trial: trial.seed)


def table(trials: Sequence[Trial]) -> list[str]:
    """Markdown: a row a variant. End values are the seeds' mean and, in brackets, their least and most."""
    labels = [metric.label for metric in METRICS_SHOWN]
    heads = ["run", "seeds", *labels, "self-check", "probes above their limit", "guards, first iteration"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, variant in VARIANTS.items():
        mine = of(trials, name)
        if mine:
            ends = [
                _range([trial.end(metric.key) for trial in mine], metric.spec) for metric in METRICS_SHOWN
            ]
            seeds = ", ".join(str(trial.seed) for trial in mine)
            cells = [variant.title, seeds, *ends, _said(mine), _probed(mine), _fired(mine)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _range(values: Sequence[float], spec: str) -> str:
    mean, low, high = (format(value, spec) for value in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def _fired(trials: Sequence[Trial]) -> str:
    """Each guard with its first iteration in each seed; a dash: it did not fire."""
    found = [trial.fired() for trial in trials]
    names = dict.fromkeys(name for each in found for name in each)
    parts = (f"`{name}` {', '.join(str(each.get(name, '–')) for each in found)}" for name in names)
    return "; ".join(parts) or "none"


def _said(trials: Sequence[Trial]) -> str:
    """What the self-check did not pass, over all seeds."""
    if not any(trial.checks for trial in trials):
        return "not known"
    wrong = {(state, title) for trial in trials for title, state in trial.checks.items() if state != "ok"}
    return "; ".join(f"{state} {title}" for state, title in sorted(wrong)) or "passes"


def _probed(trials: Sequence[Trial]) -> str:
    """The probes that the gate names, with the number of seeds."""
    said = [trial.probes for trial in trials if trial.probes is not None]
    if not said:
        return "not known"
    names = dict.fromkeys(name for each in said for name in each)
    return (
        ", ".join(f"`{name}` {sum(name in each for each in said)} of {len(said)}" for name in names) or "none"
    )


def answers(trials: Sequence[Trial]) -> list[str]:
    """Markdown: what each variant answers to one prompt in the last iteration of the lowest seed that all ran."""
    seeds = [
        {trial.seed for trial in trials if trial.variant == name} for name in {t.variant for t in trials}
    ]
    common = set.intersection(*seeds) if seeds else set()
    mine = [trial for trial in trials if trial.seed == min(common) and trial.samples] if common else []
    if not mine:
        return []
    last = {trial.variant: [row for row in trial.samples if row["step"] == len(trial.rows)] for trial in mine}
    prompts = [row["prompt"] for row in next(iter(last.values()))]
    asked = next(
        (p for p in prompts if all(p in [r["prompt"] for r in rows] for rows in last.values())), None
    )
    if asked is None:
        return []
    lines = [f"Seed {min(common)}, last iteration: *{_cell(asked)}* ...", "", "| run | answer |", "|---|---|"]
    for name in VARIANTS:
        for row in last.get(name, []):
            if row["prompt"] == asked:
                end = "" if row["ended"] else " ... (did not end)"
                lines.append(f"| {VARIANTS[name].title} | {_cell(row['response'])}{end} |")
                break
    return lines


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("|", r"\|")
