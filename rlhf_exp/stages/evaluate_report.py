"""What an evaluation publishes: report.html with its figures, tables, samples."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_exp.data.records import Prompt
from rlhf_exp.evaluation.report import PROMPTS, write_report
from rlhf_exp.evaluation.tables import table_rows
from rlhf_exp.rewards import functions, parts
from rlhf_exp.schema import COMPARED, EvalRun
from rlhf_exp.stages import compared, policies, reward_figures
from rlhf_exp.stages.candidates import KEPT
from rlhf_exp.stages.context import Context
from rlhf_exp.tracking import how_to_open, read_metrics, tracking_uri

if TYPE_CHECKING:
    from rlhf_exp.stages.evaluate import Measured

TABLE = "policies"


def publish(config: EvalRun, context: Context, evaluation: dict[str, Any], prompts: int) -> None:
    """Write eval.json and the report, and send both and the table of all policies to the tracker."""
    context.folder.write_json("eval.json", evaluation)
    ppo = context.parents.get("ppo")
    curves = read_metrics(ppo / "metrics.jsonl") if ppo else []
    with context.folder.publish("report") as folder:
        title = f"{config.model.name} on {config.dataset.name}"
        rewards = reward_figures.models(config, context)
        write_report(folder, title, evaluation, curves, facts(config, context, prompts), rewards)
    context.tracker.artifact(context.folder.path / "report", "report")
    context.tracker.artifact(context.folder.path / "eval.json")
    context.tracker.table(TABLE, table_rows(evaluation))


def facts(config: EvalRun, context: Context, prompts: int) -> dict[str, str]:
    """What the report says of the run."""
    found = {
        "model": config.model.name,
        "dataset": config.dataset.name,
        PROMPTS[config.dataset.evaluate_on]: str(prompts),
        "reward": parts.said(config.reward_source),
        "gold": config.eval.gold,
        **({"judge": compared.said(config)} if config.eval.judge != functions.NONE else {}),
        "seed": str(config.seed),
        **{_run(role, config): str(folder) for role, folder in context.parents.items()},
        "eval run": str(context.folder.path),
        "command": shlex.join(["python", "-m", "rlhf_exp", *sys.argv[1:]]),
    }
    if config.tracking.backend == "mlflow":
        found["mlflow"] = how_to_open(tracking_uri(config.tracking, config.output_dir))
    return found


def _run(role: str, config: EvalRun) -> str:
    """What a parent's folder is called."""
    if not role.startswith(COMPARED):
        return f"{role} run"
    return f"policy {policies.entries(config.eval)[int(role.removeprefix(COMPARED))].text}"


def sample_rows(measured: Measured, prompts: list[Prompt], shown: Any) -> list[dict[str, object]]:
    """The first answer to each prompt; shown(measured, i) makes a row's content."""
    return [
        {"policy": measured.candidate.name, "prompt": str(prompt.prompt), **shown(measured, i)}
        for i, prompt in enumerate(prompts)
    ]


def figures(config: EvalRun, found: Sequence[Measured], data: dict[str, Any] | None) -> dict[str, float]:
    """The run's own metrics: by kind (sft, best, ema, last), or by the names of eval.policies; and the data's."""
    if config.eval.policies:
        groups = {re.sub(r"[^\w.-]+", "_", m.candidate.name).strip("_"): m.metrics for m in found}
    else:
        groups = {m.candidate.kind: m.metrics for m in found if m.candidate.kind != KEPT}
    groups = {"last": found[-1].metrics} | groups
    groups |= {"data": data["metrics"]} if data else {}
    return {f"{group}/{name}": value for group, metrics in groups.items() for name, value in metrics.items()}
