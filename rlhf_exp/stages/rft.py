"""Rejection-sampling fine-tuning: the policy learns its own best answers (best of n, distilled).

    for each round: n answers to each prompt -> scores -> the best of each prompt -> fine-tune the policy on them

Best-of-n is Stiennon et al. 2020's; fine-tuning on what it selects is Touvron et al. 2023 (Llama 2, section 3.2.3),
Yuan et al. 2023 (RFT, all correct answers instead of the best) and Dong et al. 2023 (RAFT, in rounds). The policy
starts as the SFT adapter; each round samples from it as the last round left it, with another noise. The loss is that
of SFT, the mean over a batch's answer tokens, on the very ids that were scored, EOS included where an answer ended.
There is no dropout, as in PPO. Left out: RAFT's ranking over a batch of prompts (its "global" variant).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rlhf_exp import distributed
from rlhf_exp.algorithms.logprob import linear_logprobs
from rlhf_exp.data import labels
from rlhf_exp.data.load import statistics
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.rollout.scoring import answers, dealt, hidden_before
from rlhf_exp.schema import RFTRun
from rlhf_exp.stages import checkpoint, microbatch, sft, supervised
from rlhf_exp.stages.checkpoint import Keeper
from rlhf_exp.stages.context import ADAPTER, SELECTED, Context
from rlhf_exp.stages.ilql import put_roles
from rlhf_exp.stages.optim import adamw, schedule
from rlhf_exp.stages.order import piece_of
from rlhf_exp.stages.prefer import said
from rlhf_exp.stages.selection import Tally, of_round, select
from rlhf_exp.stages.written import rows_of, written

SHOW = (
    ("rft/score", "score", ".2f"),
    ("rft/kept_score", "best", ".2f"),
    ("train/loss", "loss", ".3f"),
    ("optim/lr", "lr", ".1e"),
)
REPORT = "rft.json"
SHOWN = 6  # answers of a round in samples.jsonl and rft.json


@dataclass
class Course:
    """How far it is, and what is learned; plain, so that a checkpoint can hold it."""

    round: int = 1
    parts: int = 0  # of this round's prompts that are answered
    steps: int = 0  # optimiser steps of this round
    rows: list[dict[str, Any]] = field(default_factory=list)  # to learn in this round (selection.py)
    tallies: list[dict[str, Any]] = field(default_factory=list)  # of each round so far, this one's too
    losses: float = 0.0  # of this round, summed over its steps


class Training:
    """A round's optimiser, schedule and data."""

    def __init__(self, config: RFTRun, roles: Roles, course: Course, saved: dict[str, Any] | None):
        """saved: of `state`, in a run that goes on."""
        eos = roles.base.eos_id
        self.rollout = written(
            [row["asked"] for row in course.rows], [row["ids"] for row in course.rows], eos
        )
        self.steps = supervised.steps_of(config.train, len(course.rows))
        self.weights = roles.parameters("policy")
        self.optimizer = adamw(self.weights, config.optim, config.strategy)
        self.scheduler = schedule(self.optimizer, config.optim, self.steps)
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}


class Run:
    """One run of the stage, which goes on from a checkpoint."""

    def __init__(self, config: RFTRun, context: Context, roles: Roles, found: checkpoint.Checkpoint):
        self.config, self.context, self.roles = config, context, roles
        self.heads = put_roles(config, context, roles)
        self.course, self.step = Course(), found.step
        self.training: Training | None = None
        self.saved: dict[str, Any] | None = None
        if found.step:
            self.course, self.saved = Course(**found.tree["course"]), found.tree["training"]
            with torch.no_grad():
                for weight, value in zip(roles.parameters("policy"), found.tree["policy"], strict=True):
                    weight.copy_(value)
            checkpoint.set_random_state(found.tree["random"])

    def snapshot(self) -> dict[str, Any]:
        training = None if self.training is None else self.training.state()
        return {
            "course": asdict(self.course),
            "policy": self.roles.parameters("policy"),
            "training": training,
        }

    def sample(self, parts: Sequence[Any], log: Any, keeper: Keeper) -> None:
        """Answer the round's prompts that are left, and keep the best answers."""
        course = self.course
        if not course.parts:
            course.tallies.append(asdict(Tally(course.round)))
        known = {(row["id"], row["text"]) for row in course.rows}
        for part in parts[course.parts :]:
            tally = Tally(**course.tallies[-1])
            course.rows += select(self.config, self.context, self.roles, self.heads, part, tally, known)
            course.tallies[-1] = asdict(tally)
            course.parts, self.step = course.parts + 1, self.step + 1
            log.step(self.step, tally.metrics())
            if course.parts == len(parts):
                log.samples(self.step, shown(course))
            keeper.after(self.step)

    def train(self, log: Any, keeper: Keeper) -> None:
        """Learn what is kept, from where the policy is."""
        course, config = self.course, self.config
        if not course.rows:
            raise InputError(nothing_kept(config, Tally(**course.tallies[-1])))
        training = self.training = Training(config, self.roles, course, self.saved)
        self.saved = None
        log.expect(self.step + training.steps - course.steps + self.later(training.steps))
        seed, size = row_key(config.seed, course.round, 0), config.train.batch_size
        for number in range(course.steps + 1, training.steps + 1):
            rows = piece_of(len(course.rows), size, seed, number)
            metrics = update(config, self.roles, rows_of(training.rollout, rows), training)
            course.losses += metrics["train/loss"]
            course.steps, self.step = number, self.step + 1
            log.step(self.step, metrics)
            keeper.after(self.step, last=number == training.steps and course.round == config.rft.rounds)

    def later(self, steps: int) -> int:
        """About how many steps the rounds after this one have."""
        return (self.config.rft.rounds - self.course.round) * (self.course.parts + steps)

    def next(self) -> None:
        """On to the next round."""
        rows = self.course.rows if self.config.rft.pool == "union" else []
        self.training = None
        self.course = Course(self.course.round + 1, rows=rows, tallies=self.course.tallies)


def run(config: RFTRun, context: Context) -> dict[str, float]:
    """Sample, select and train, round by round; publish the adapter, selected.jsonl and rft.json."""
    torch.manual_seed(config.seed)
    prompts, tokens = context.read(config.dataset, "prompts", "train")
    config = microbatch.settle(config, context, tokens.prompts)
    asked = list(zip(prompts, tokens.prompts, strict=True))
    with Roles(context.base, config.memory.gradient_checkpointing) as roles:
        found = checkpoint.newest(context)
        now = Run(config, context, roles, found)
        with context.log("rft", expected(config, asked), SHOW, found) as log:
            with Keeper(context, -1, log, now.snapshot) as keeper:  # -1: it is told which step is the last
                while True:
                    now.sample(of_round(config, asked, now.course.round), log, keeper)
                    now.train(log, keeper)
                    if now.course.round == config.rft.rounds:
                        break
                    now.next()
            with context.folder.publish(ADAPTER) as folder:
                roles.save("policy", folder)
            log.samples(now.step, sft.samples(config, context, lambda: roles.use("policy"), tokens.prompts))
    metrics = publish(context, now.course)
    return metrics | statistics(config.dataset, "prompts").metrics() | tokens.cuts.metrics()


def expected(config: RFTRun, asked: Sequence[Any]) -> int:
    """About how many steps there will be: all answers that can be kept are."""
    parts, rft = of_round(config, asked, 1), config.rft
    rows = max(1, sum(map(len, parts)) * (rft.keep or rft.samples))
    return rft.rounds * (len(parts) + supervised.steps_of(config.train, rows))


def update(config: RFTRun, roles: Roles, batch: Rollout, training: Training) -> dict[str, float]:
    """One optimiser step; the loss is the mean of -log p over the batch's answer tokens, as in SFT."""
    started = time.perf_counter()
    (output, bias), tokens = roles.base.output_layer, sum(map(len, batch.responses))
    loss = torch.zeros((), device=roles.base.device)
    groups = dealt(batch, range(len(batch.prompts)), config.train.micro_batch_size)
    for micro, counts in distributed.turns(groups, roles.base.in_shards):
        some = answers(batch, micro, roles.base)
        hidden = hidden_before(roles, "policy", some)
        layer = roles.base.output(hidden.dtype)
        found = linear_logprobs(hidden, output, bias, some.targets, entropy=False, layer=layer)
        part = -found.logprobs.sum() / tokens
        (part if counts else 0 * part).backward()
        loss += counts * part.detach()
    distributed.sum_gradients(training.weights)
    norm = torch.nn.utils.clip_grad_norm_(training.weights, config.optim.max_grad_norm)
    metrics = distributed.add({"train/loss": float(loss)}) | {"train/grad_norm": float(norm)}
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(wrong)}: no finite number; lower optim.lr")
    metrics["optim/lr"] = training.scheduler.get_last_lr()[0]
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.scheduler.step()
    metrics["time/step"] = time.perf_counter() - started
    return metrics | {"tokens_per_second": tokens / metrics["time/step"]}


def nothing_kept(config: RFTRun, tally: Tally) -> str:
    """Why there is nothing to learn, in a line."""
    keys = ["rft.threshold"] * (config.rft.threshold is not None)
    keys += ["generation.max_new_tokens (or rft.unfinished=keep)"] * (config.rft.unfinished == "drop")
    return (
        f"none of {tally.answers} answers of round {tally.round} is left to learn ({said(tally.dropped)}): look at "
        f"{', '.join([*keys, 'rft.samples'])}"
    )


def shown(course: Course) -> list[dict[str, object]]:
    """A few of the newest round's answers that are learned, for people."""
    mine = [row for row in course.rows if row["round"] == course.round][:SHOWN]
    names = ("text", "score", "gold", "ended", "round")
    return [
        {"prompt": row["fields"]["prompt"]}
        | {"response" if name == "text" else name: row[name] for name in names if name in row}
        for row in mine
    ]


def publish(context: Context, course: Course) -> dict[str, float]:
    """Write what was learned last as rows of family jsonl, and rft.json; print a line a round; the metrics."""
    rows = [
        row["fields"]
        | {"response": row["text"], "score": row["score"], "ended": row["ended"], "round": row["round"]}
        for row in course.rows
    ]
    context.folder.write_text(SELECTED, labels.text_of(rows))
    tallies = [Tally(**each) for each in course.tallies]
    rounds = [each.metrics() | {"left out": each.dropped} for each in tallies]
    context.folder.write_json(REPORT, {"rounds": rounds, "samples": shown(course)})
    for name in (SELECTED, REPORT):
        context.tracker.artifact(context.folder.path / name)
    for each in tallies:
        found = each.metrics()
        print(
            f"round {each.round}: {each.answers} answers, mean score {found['rft/score']:.4g} -> {each.kept} "
            f"learned, mean score {found.get('rft/kept_score', math.nan):.4g}; left out: {said(each.dropped)}",
            flush=True,
        )
    metrics = tallies[-1].metrics() | {"train/loss": course.losses / max(1, course.steps)}
    return metrics | {"rft/learned": float(len(course.rows))}
