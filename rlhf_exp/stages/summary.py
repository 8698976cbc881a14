"""What a person sees at the end: figures, samples, where things are, how to open MLflow."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_exp.schema import PROBES, Limits, Run
from rlhf_exp.stages.context import EVALUATION, EXPORT, MARGINS, PREFERENCES
from rlhf_exp.stages.gate import PICTURE, PROBE, REPORT, failures
from rlhf_exp.stages.nodes import Node, Plan

# of a policy that learns from comparisons
POLICY_FIGURES = (
    ("train/loss", "loss"),
    ("validation/accuracy", "validation accuracy"),
    ("validation/accuracy_low", "from"),
    ("validation/accuracy_high", "to"),
    ("validation/length_accuracy", "length-only baseline"),
    ("validation/pairs", "pairs"),
)
# the figures of a stage worth a line on the screen; all are in run.json
FIGURES = {
    "sft": (("train/loss", "loss"), ("data/rows", "rows")),
    "prefer": (
        ("prefer/comparisons", "comparisons"),
        ("prefer/train", "train"),
        ("prefer/validation", "validation"),
        ("prefer/margin", "margin"),
        ("prefer/longer_chosen", "longer one chosen"),
    ),
    "reward": (
        ("validation/accuracy", "validation accuracy"),
        ("validation/accuracy_low", "from"),
        ("validation/accuracy_high", "to"),
        ("validation/length_accuracy", "length-only baseline"),
        ("validation/ece", "calibration error"),
        ("validation/pairs", "pairs"),
    ),
    "ppo": (
        ("objective/scores", "score"),
        ("objective/gold", "gold"),
        ("objective/kl", "KL"),
        ("response/length_mean", "length"),
    ),
    "dpo": POLICY_FIGURES,
    "kto": POLICY_FIGURES,
    "rft": (
        ("train/loss", "loss"),
        ("rft/score", "score"),
        ("rft/kept_score", "of the best"),
        ("rft/kept", "answers learned"),
        ("rft/answers", "of"),
    ),
    "ilql": (
        ("eval/best_reward", "reward"),
        ("eval/best_beta", "at beta"),
        ("data/reward", "of the data"),
    ),
}
SHOWN_PROMPTS = 3


def show(plan: Plan) -> None:
    """Print the summary of a plan that is built; what was asked for comes last, under its tables."""
    for node in plan.nodes:
        if node is not plan.target:
            _figures(node)
    target = plan.target.found
    if plan.target.stage == "eval":
        _tables(target.path / "eval.json")
    if (report := target.path / PROBE / REPORT).is_file():
        _probes(json.loads(report.read_text(encoding="utf-8")))
        print(end="\n" * (plan.target.stage in FIGURES))
    if (pairs := target.path / PREFERENCES).is_file():
        _pairs(json.loads(pairs.read_text(encoding="utf-8")))
    _figures(plan.target)
    print(f"\nrun folder   {_shown(target.path)}")
    if (picture := target.path / PROBE / PICTURE).is_file():
        print(f"picture      {_shown(picture)}")
    if (margins := target.path / EVALUATION / MARGINS).is_file():
        print(f"margins      {_shown(margins)}")
    if (files := target.path / EXPORT).is_dir():
        print(f"files        {_shown(files)}")
    if (report := target.path / "report" / "report.html").is_file():
        print(f"report       {_shown(report)}")
    _mlflow(plan.config)


def _figures(node: Node) -> None:
    if node.found and node.stage in FIGURES:
        metrics = node.found.read().get("metrics", {})
        said = [
            f"{label} {metrics[key]:.4g}"
            for key, label in FIGURES[node.stage]
            if metrics.get(key) is not None
        ]
        print(f"{node.name:6s} {node.key[:6]}  {', '.join(said)}")


def _tables(path: Path) -> None:
    from rich.console import Console

    from rlhf_exp.evaluation.tables import samples_table, summary_table

    evaluation = json.loads(path.read_text())
    console = Console()
    console.print()
    console.print(summary_table(evaluation))
    if evaluation["samples"]:
        console.print(samples_table(evaluation, SHOWN_PROMPTS))


def _probes(report: dict[str, Any]) -> None:
    from rich.console import Console

    from rlhf_exp.probes.show import examples, table

    limits = asdict(Limits())
    console = Console()
    console.print()
    console.print(table(report, limits))
    for line in examples(
        report, [failure.kind for failure in failures(report, Limits()) if failure.kind in PROBES]
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _pairs(report: dict[str, Any]) -> None:
    """A few of the comparisons that stage=prefer wrote."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"comparisons labelled by {report['labellers'][0]}", show_lines=True)
    for name in ("prompt", "chosen", "rejected", "margin"):
        table.add_column(name, justify="right" if name == "margin" else "left")
    for row in report["samples"]:
        # as text: an answer may hold what rich takes for markup
        table.add_row(*(Text(row[name]) for name in ("prompt", "chosen", "rejected")), f"{row['margin']:.3g}")
    console = Console()
    console.print()
    console.print(table)


def _mlflow(config: Run) -> None:
    if config.tracking.backend == "mlflow":
        from rlhf_exp.tracking import how_to_open, tracking_uri

        print(f"MLflow       {how_to_open(tracking_uri(config.tracking, config.output_dir))}")


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    return min(str(path), os.path.relpath(path), key=len)
