"""Probes of a reward model: what it gives to answers that say nothing (docs/probes.md).

A stage of its own (stage=probe), and the end of the reward stage. Writes probe.json and probe.png to probe/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlhf_exp import distributed
from rlhf_exp.data.records import Comparison
from rlhf_exp.data.tokenised import Tokenised
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.probes import answers, measure, texts
from rlhf_exp.probes.answers import Probe, Real
from rlhf_exp.probes.scorer import LearnedScorer
from rlhf_exp.probes.show import write_picture
from rlhf_exp.progress import Progress
from rlhf_exp.schema import PROBES, SAME, Dataset, Limits, ProbeRun, RewardRun
from rlhf_exp.stages.actors import load_reward_models
from rlhf_exp.stages.context import Context
from rlhf_exp.stages.gate import PICTURE, PROBE, REPORT
from rlhf_exp.store.runs import RunFolder, plain

ROWS = 16  # answers a forward
AGAIN = 8  # pairs that are scored once more, padded and among others

Rows = tuple[Sequence[Comparison], Tokenised]


def run(config: ProbeRun, context: Context) -> dict[str, float]:
    """Probe the reward model that the run stands on."""
    asked, split = config.probe, config.probe.split
    rows = context.read(config.dataset, "comparisons", split)
    report = look(context, config.dataset, rows, asked.pairs, config.seed, asked.kinds)
    if report is None:
        raise InputError(
            f"none of the {len(rows[0])} {split} pairs has a chosen answer of at most dataset.max_response_tokens="
            f"{config.dataset.max_response_tokens} tokens: raise it, or choose another probe.split"
        )
    publish(context.folder, report | {"split": split})
    return measure.metrics(report) | {"probe/pairs": float(report["pairs"])}


def at_the_end(
    config: RewardRun, context: Context, scores: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Probe the reward model that this run has published; scores: of all validation pairs, chosen and rejected.

    Where there is nothing to probe it with, nothing is written, and no metric returned.
    """
    if not config.reward.probes or not scores:
        return {}
    distributed.barrier()  # rank 0 has published it
    rows = context.read(config.dataset, "comparisons", "validation")
    trained = Context(context.base, context.folder, context.tracker, {"reward": context.folder.path})
    report = look(trained, config.dataset, rows, config.reward.probes, config.seed)
    if report is None:
        return {}
    every = [{"id": row.id, "chosen": c, "rejected": r} for row, (c, r) in zip(rows[0], scores, strict=True)]
    publish(context.folder, report | {"split": "validation", "validation": every})
    return measure.metrics(report)


def look(
    context: Context,
    dataset: Dataset,
    rows: Rows,
    count: int,
    seed: int,
    kinds: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The report on the `count` pairs of the smallest prompt ids (0: all); None where no chosen answer is whole."""
    base, kinds = context.base, kinds or (*PROBES, *SAME)
    whole = answers.reals(*rows, base.eos_id)
    real = sorted(whole, key=lambda each: each.record.id)[: count or None]
    if not real:
        return None
    print(
        f"probes: {len(real)} of {len(rows[0])} pairs"
        + (f", {left} whose chosen answer is cut left out" if (left := len(rows[0]) - len(whole)) else ""),
        flush=True,
    )
    made = {
        kind: answers.build(base.tokenizer, dataset, real, kind, seed) for kind in PROBES if kind in kinds
    }
    same = respaced(base.tokenizer, dataset, real) if "whitespace" in kinds else []
    prompts = ({tuple(real[i].prompt) for i in rows} for rows in (range(len(real)), [p.row for p in same]))
    total = sum(map(len, prompts))
    with Roles(base) as roles, Progress("probe", total, ()) as progress:
        head = load_reward_models(("reward",), context, roles)["reward"]
        scorer = LearnedScorer(roles, "reward", head, ROWS, lambda done: progress.update(done, {}))
        chosen = [Probe(i, each.record.chosen, each.chosen) for i, each in enumerate(real[:AGAIN])]
        again = {
            "whitespace": (same, scorer),
            "padding": (chosen, scorer.padded),
            "neighbours": (chosen, scorer.neighbours),
        }
        return measure.measure(real, made, scorer, {name: again[name] for name in SAME if name in kinds})


def respaced(tokenizer: Any, dataset: Dataset, real: Sequence[Real]) -> list[Probe]:
    """The chosen answers with other whitespace, where that gives other ids and is not cut."""
    made = [texts.respaced(each.record.chosen, i) for i, each in enumerate(real)]
    encoded = answers.encode(tokenizer, dataset, "whitespace", made)
    return [
        Probe(i, text, ids)
        for i, (text, ids) in enumerate(zip(made, encoded, strict=True))
        if ids is not None and ids != real[i].chosen
    ]


def publish(folder: RunFolder, report: dict[str, Any]) -> None:
    """probe/probe.json and probe/probe.png."""
    with folder.publish(PROBE) as path:
        text = json.dumps(plain(report), indent=1, allow_nan=False, ensure_ascii=False)
        (path / REPORT).write_text(text + "\n", encoding="utf-8")
        write_picture(path / PICTURE, report, asdict(Limits()))
