"""What more devices would bring: `python -m rlhf_exp.simulate RUN_FOLDER --ranks 1 2 4 8 --bandwidth 10`.

A model on paper with a measured start: one PPO run on one device says how long rollout, scoring and update take; rows
are divided over n ranks, and what travels is added. Left out: overlap of computing and sending, ranks that wait for
each other's longest answer, and loading. So it shows where communication begins to count, and no more.

    a part       a + b ceil(rows / n)       a: what does not depend on the rows, as reading the weights for each
                                            token; from two runs of different ppo.batch_size, else 0
    all-reduce   2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency       (ring; Patarasuk & Yuan 2009)
    all-gather   (n - 1) / n bytes / bandwidth + (n - 1) latency

With LoRA only gradients of adapters are reduced, once an optimiser step; under zero1 and zero2 DeepSpeed reduces them
once more and gathers the stepped weights; zero3 gathers every layer of the base in each forward and each backward,
and all of them once for a rollout.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.memory.table import gigabytes, printed

PARTS = ("rollout", "score", "update")
METRICS = "metrics.jsonl"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Link:
    """Between ranks: bytes a second that each sends, seconds until the first arrives."""

    bandwidth: float
    latency: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds."""
        return 2 * self.all_gather(size, ranks)

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds until every rank has all of `size` bytes, of which each had its share."""
        return (ranks - 1) / ranks * size / self.bandwidth + (ranks - 1) * self.latency


@dataclass(frozen=True)
class Part:
    """Seconds of a part of an iteration on one device: fixed + by_row * rows."""

    fixed: float
    by_row: float

    def seconds(self, rows: int) -> float:
        return self.fixed + self.by_row * rows


@dataclass(frozen=True)
class Job:
    """An iteration: what is computed in it, and bytes that may travel."""

    rows: int
    micro: int  # rows a forward
    steps: int  # optimiser steps: epochs times minibatches
    epochs: int
    trained: float  # bytes of what is trained, in float32
    base: float = 0.0  # bytes of the frozen base's layers
    layers: int = 1

    def passes(self, ranks: int) -> int:
        """Forwards and backwards through the base on one rank, without those of the rollout.

        Each epoch has a forward and a backward of every micro-batch; old log-probs, the reference's and the reward
        model's scores are a forward each.
        """
        micro = math.ceil(math.ceil(self.rows / ranks) / self.micro)
        return micro * (2 * self.epochs + 3)


@dataclass(frozen=True)
class Iteration:
    """Seconds of one iteration on several ranks, and bytes that a rank sends in it."""

    parts: dict[str, float]
    sending: float
    sent: float

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.sending


def fitted(runs: Sequence[tuple[int, float]]) -> Part:
    """From (rows, seconds) of one run: all by the row; of two: the line through both, no part of it negative."""
    (rows, seconds), *others = runs
    if not others:
        return Part(0.0, seconds / rows)
    other_rows, other_seconds = others[0]
    by_row = max(0.0, (other_seconds - seconds) / (other_rows - rows))
    fixed = max(0.0, seconds - by_row * rows)
    return Part(fixed, by_row if fixed else seconds / rows)


def simulate(parts: dict[str, Part], job: Job, link: Link, strategy: str, ranks: int) -> Iteration:
    """One iteration of `job` on `ranks` ranks."""
    rows = math.ceil(job.rows / ranks)
    seconds = {name: part.seconds(rows) for name, part in parts.items()}
    if ranks == 1:
        return Iteration(seconds, 0.0, 0.0)
    ring = (ranks - 1) / ranks
    sending = job.steps * link.all_reduce(job.trained, ranks)
    sent = job.steps * 2 * ring * job.trained
    if strategy != "ddp":
        sending += job.steps * (link.all_reduce(job.trained, ranks) + link.all_gather(job.trained, ranks))
        sent += job.steps * 3 * ring * job.trained
    if strategy == "zero3":
        gathers = job.passes(ranks) + 1  # the rollout's
        sending += gathers * job.layers * link.all_gather(job.base / job.layers, ranks)
        sent += gathers * ring * job.base
    return Iteration(seconds, sending, sent)


# ---------------------------------------------------------------- from runs


def read(folder: Path) -> tuple[int, dict[str, float], dict[str, Any]]:
    """Rows an iteration, mean seconds of each part (without the first iteration, which warms up), the config.

    InputError for a folder that is no PPO run, or has no iteration.
    """
    import yaml

    from rlhf_exp.store.frozen import CONFIG
    from rlhf_exp.tracking import read_metrics

    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is no run folder: it has no {CONFIG}")
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    for row in read_metrics(folder / METRICS):
        for name in PARTS:
            if f"time/{name}" in row:
                found[name].append(float(row[f"time/{name}"]))
    if not all(found.values()) or "ppo" not in config:
        raise InputError(
            f"{folder} is no PPO run with an iteration: it has no time/rollout, time/score, time/update"
        )
    means = {name: sum(values[1:] or values) / len(values[1:] or values) for name, values in found.items()}
    return config["ppo"]["batch_size"] * config["ppo"]["samples_per_prompt"], means, config


def trained_bytes(folder: Path) -> float:
    """Of the run's adapter and value head: what is reduced."""
    files = [
        *folder.glob("adapter/*.safetensors"),
        *folder.glob("critic/*.safetensors"),
        *folder.glob("head/*"),
    ]
    return float(sum(file.stat().st_size for file in files))


def job_of(folder: Path, config: dict[str, Any], rows: int, base_gb: float, layers: int) -> Job:
    ppo = config["ppo"]
    return Job(
        rows=rows,
        micro=ppo["micro_batch_size"] or rows,
        steps=ppo["epochs"] * ppo["minibatches"],
        epochs=ppo["epochs"],
        trained=trained_bytes(folder),
        base=base_gb * 1e9,
        layers=layers,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_exp.simulate",
        description="One PPO iteration on several devices, from a measured run.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="a PPO run folder; a second one with another batch size"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--strategies", nargs="+", default=["ddp"], choices=STRATEGIES)
    parser.add_argument(
        "--rows", type=int, help="answers an iteration on all ranks; default: the first run's"
    )
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB a second that a rank sends (10)")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds (20)")
    parser.add_argument(
        "--base-gb", type=float, default=0.0, help="GB of the base's layers, which zero3 gathers"
    )
    parser.add_argument("--layers", type=int, default=32, help="of the base (32)")
    options = parser.parse_args(argv)
    try:
        for line in table(options):
            print(line)
    except InputError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def table(options: argparse.Namespace) -> list[str]:
    """A row for each strategy and number of ranks."""
    if "zero3" in options.strategies and not options.base_gb:
        raise InputError("zero3 gathers the base's layers: say with --base-gb how large they are")
    for name in ("ranks", "rows", "layers", "bandwidth"):
        given = getattr(options, name)
        least = min(given) if isinstance(given, list) else given
        if least is not None and not least > 0:
            raise InputError(f"--{name} must be more than 0, got {least:g}")
    if options.latency < 0 or options.base_gb < 0:
        raise InputError("--latency and --base-gb must be at least 0")
    found = [read(folder) for folder in options.runs[:2]]
    if len(found) == 2 and found[0][0] == found[1][0]:
        raise InputError(
            f"both runs have {found[0][0]} answers an iteration: they must differ in ppo.batch_size"
        )
    parts = {name: fitted([(rows, means[name]) for rows, means, _ in found]) for name in PARTS}
    rows = options.rows or found[0][0]
    job = job_of(options.runs[0], found[0][2], rows, options.base_gb, options.layers)
    return printed(_filled(parts, job, Link(options.bandwidth * 1e9, options.latency * 1e-6), options))


def _filled(parts: dict[str, Part], job: Job, link: Link, options: argparse.Namespace) -> Any:
    from rich.table import Table

    shown = Table(show_edge=False, pad_edge=False)
    names = (
        "strategy",
        "ranks",
        *(f"{name} s" for name in PARTS),
        "sending s",
        "total s",
        "speedup",
        "each sends",
    )
    for name in names:
        shown.add_column(name, justify="left" if name == "strategy" else "right")
    alone = simulate(parts, job, link, "ddp", 1).total
    for strategy in options.strategies:
        for ranks in options.ranks:
            one = simulate(parts, job, link, strategy, ranks)
            seconds = (*(one.parts[name] for name in PARTS), one.sending, one.total)
            cells = (*(f"{value:.3g}" for value in seconds), f"{alone / one.total:.2f}", gigabytes(one.sent))
            shown.add_row(strategy, str(ranks), *cells)
    return shown


if __name__ == "__main__":
    sys.exit(main())
