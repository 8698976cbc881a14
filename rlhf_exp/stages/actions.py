"""What follows when a guard fires (guards.py): a line, a row, and a change of the run.

    warn      nothing else
    raise_kl  kl_coef times RAISE
    lower_lr  learning rates times LOWER, now and in the schedule
    rollback  the policy is again the best kept adapter
    stop      the run ends here, as a finished one

nan or inf: the batch is put down, the policy is again the last kept adapter whose answers were sound, KL controller
and running moments are what they were before the iteration, the learning rate is lowered; after
`ppo.guards.max_recoveries` of these the run stops. After a return the optimiser's moments, which belong to weights
that are gone, start at 0; the critic stays, unless it holds nan itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_exp import distributed
from rlhf_exp.data.records import Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import lora_config
from rlhf_exp.schema import PPORun
from rlhf_exp.stages import guards
from rlhf_exp.stages.actors import EMA, Actors
from rlhf_exp.stages.context import ADAPTER, CHECKPOINTS, Context
from rlhf_exp.stages.guards import BROKEN, NAN, Fired, Guards
from rlhf_exp.stages.state import State

RAISE, LOWER = 2.0, 0.5
ROWS, DUMPS, BEST = "guards.jsonl", "nan", "best.json"
RESTORED = "restored"  # a role that is there for a moment


@dataclass
class Watch:
    """The run as the actions change it."""

    config: PPORun
    context: Context
    actors: Actors
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    state: State
    guards: Guards
    error: str | None = None  # of the rollout of this iteration

    def __post_init__(self) -> None:
        # made before a checkpoint is read: the critic as it started
        self.critic_start = [p.detach().clone() for p in self.actors.critic_parameters()]
        self.begin()

    def begin(self) -> None:
        """An iteration begins."""
        self.before = self.state.copy()

    def failed(self, error: FloatingPointError) -> dict[str, float]:
        """The metrics of an iteration whose answers could not be sampled."""
        self.error = str(error)
        return {BROKEN: 1.0}

    def after(
        self,
        step: int,
        metrics: Mapping[str, float],
        prompts: Sequence[Prompt] = (),
        encoded: Sequence[Sequence[int]] = (),
        answers: Sequence[Mapping[str, object]] = (),
    ) -> dict[str, float]:
        """Look at an iteration and act; the metrics `guard/<name>` of those that fired.

        answers: to the prompts, in their order; none where sampling failed. InputError where the very first iteration
        was not sound: there is nothing to go back to.
        """
        fired = self.guards.watch(self.config.ppo, step, metrics)
        batch = [
            {"id": str(prompt.id), "text": str(prompt.prompt), "ids": list(ids)}
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]
        for row, answer in zip(batch, answers, strict=False):
            row |= {key: value for key, value in answer.items() if key != "prompt"}
        for one in fired:
            did = self.recover(one, step, batch) if one.guard == NAN else self.act(one)
            self.say(one, step, did)
        self.error = None
        return {f"guard/{one.guard}": 1.0 for one in fired}

    def say(self, fired: Fired, step: int, did: str) -> None:
        """A line on the screen, a row in guards.jsonl: rewritten whole, so that a resumed run has no row twice."""
        print(f"guard {fired.guard} at iteration {step}: {fired.says}; {did}", flush=True)
        self.guards.rows.append(writable({"step": step, **asdict(fired), "did": did}))
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in self.guards.rows)
        self.context.folder.write_text(ROWS, "".join(f"{line}\n" for line in lines))

    # ---------------------------------------------------------------- actions

    def act(self, fired: Fired) -> str:
        """Do what the guard asks for; in words."""
        if fired.action == "raise_kl":
            self.state.kl_coef *= RAISE
            return f"kl_coef is now {self.state.kl_coef:.3g}"
        if fired.action == "lower_lr":
            return self.lower_lr()
        if fired.action == "rollback":
            return self.restore(self.guards.best() or 0)
        if fired.action == "stop":
            self.guards.stopped = f"guard {fired.guard}: {fired.says}"
            return "the run ends here"
        return "nothing is changed (warn)"

    def lower_lr(self) -> str:
        """Every learning rate times LOWER: of the next update, and of the schedule from there on."""
        self.scheduler.base_lrs = [lr * LOWER for lr in self.scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            for name in {"lr", "initial_lr"} & set(group):
                group[name] *= LOWER
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        return f"the learning rate is now {self.scheduler.get_last_lr()[0]:.3g}"

    @torch.no_grad()
    def restore(self, step: int) -> str:
        """The policy as it was kept after iteration `step` (0: as it started), bit for bit, and its average too."""
        roles, folder = self.actors.roles, self.folder_of(step)
        distributed.barrier()  # rank 0 has written it
        if folder is None:
            lora = lora_config(self.config.lora, self.config.model)
            roles.new(RESTORED, lora, self.config.seed, trainable=False)
        else:
            roles.load(RESTORED, folder)
        for role in ("policy", EMA) if self.actors.ema else ("policy",):
            for now, then in zip(roles.parameters(role), roles.parameters(RESTORED), strict=True):
                now.copy_(then)
        roles.remove(RESTORED)
        self.repair_critic()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.guards.returned(step)
        return f"the policy is again {self.name_of(step)}"

    def repair_critic(self) -> None:
        """A critic that holds nan starts anew, as it first did; another stays."""
        now = self.actors.critic_parameters()
        if all(bool(parameter.isfinite().all()) for parameter in now):
            return
        for parameter, start in zip(now, self.critic_start, strict=True):
            parameter.copy_(start)

    def folder_of(self, step: int) -> Path | None:
        """Where the adapter that was kept after `step` is; None: the policy started as a new one."""
        if step == 0:
            return self.context.adapter("sft")
        return self.context.folder.path / CHECKPOINTS / f"step_{step:05d}"

    def name_of(self, step: int) -> str:
        return f"that of {CHECKPOINTS}/step_{step:05d}" if step else "as it started"

    # ---------------------------------------------------------------- nan

    def recover(self, fired: Fired, step: int, batch: Sequence[dict[str, Any]]) -> str:
        """Put the batch down; go back and on with half the learning rate, or stop."""
        dump = f"{DUMPS}/step_{step:05d}.json"
        self.context.folder.write_json(
            dump,
            {
                "step": step,
                "reason": self.error or fired.says,
                "tensors": self.not_finite(),
                "learning_rate": self.scheduler.get_last_lr(),
                "prompts": [writable(row) for row in batch],
            },
        )
        self.context.tracker.artifact(self.context.folder.path / dump, DUMPS)
        if not self.guards.kept:
            raise InputError(
                f"PPO's first iteration is not sound: {self.error or fired.says}: model, SFT adapter or reward "
                "give nan before anything is trained (model.dtype, adapters.sft, reward_source.parts); the batch is "
                f"in {self.context.folder.path / dump}"
            )
        self.state.forget(self.before)
        sound = max(self.guards.kept)
        back = self.restore(sound)
        if self.guards.recoveries >= self.config.ppo.guards.max_recoveries:
            self.guards.stopped = f"guard {NAN}: {self.error or fired.says}"
            return (
                f"{back}, and the run ends here after {self.guards.recoveries} recoveries "
                f"(ppo.guards.max_recoveries); lower optim.lr, or raise ppo.kl_coef; the batch is in {dump}"
            )
        self.guards.recoveries += 1
        return f"{back}, {self.lower_lr()}; the batch is in {dump}"

    def not_finite(self) -> list[str]:
        """The names of all weights that hold nan or inf."""
        named = dict(self.actors.base.model.named_parameters())
        for name, head in (("value_head", self.actors.value_head), ("reward_head", self.actors.reward_head)):
            if head is not None:
                named |= {f"{name}.{part}": value for part, value in head.named_parameters()}
        return [name for name, value in named.items() if not bool(value.isfinite().all())]

    # ---------------------------------------------------------------- the end

    def finish(self) -> dict[str, float]:
        """best.json, a line that names best and last, why the run stopped; the figures for run.json.

        The last adapter was never asked again: its worth is that of the last answers, an update before.
        """
        mine, ppo = self.guards, self.config.ppo
        if mine.stopped:
            self.context.folder.update(stopped_by=mine.stopped)
            print(f"stopped at iteration {mine.step} of {ppo.steps} by {mine.stopped}", flush=True)
        worths = {step: worth for step, worth in mine.kept.items() if step and self.folder_of(step).is_dir()}
        if mine.worth is not None:
            worths.setdefault(mine.step, mine.worth)
        if not worths:
            return dict(mine.last)
        best = max(worths, key=lambda step: (worths[step], -step))
        found = {step: self._described(step, worths.get(step)) for step in (best, mine.step)}
        name = guards.worth_name(ppo, gold=guards.GOLD in mine.last)
        start = mine.kept.get(0)
        self.context.folder.write_json(
            BEST, {"metric": name, **found[best], "last": found[mine.step], "start": start}
        )
        print(
            f"best: {found[best]['adapter']} ({name} {worths[best]:.3g}); "
            f"last: {ADAPTER}, step {mine.step}" + (f" ({mine.worth:.3g})" if mine.worth is not None else ""),
            flush=True,
        )
        return mine.last | {"best/step": float(best), "best/value": worths[best]}

    def _described(self, step: int, worth: float | None) -> dict[str, Any]:
        adapter = ADAPTER if step == self.guards.step else f"{CHECKPOINTS}/step_{step:05d}"
        return {"step": step, "value": worth, "adapter": adapter}


def writable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: a number that is none, as text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
