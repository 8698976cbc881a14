"""PPO with LoRA on one frozen base (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    sample answers -> score them -> log-probs and values of policy, log-probs of ref -> per-token rewards
    -> advantages -> a few epochs of clipped updates

Here is what happens in an iteration; what answers are paid and what that makes of tokens is in experience.py, the
losses' epochs are in update.py. The old log-probs come from the same forward, in the same micro-batches, as the
first epoch's new ones, and the reference's likewise: before the first update the ratio is exactly 1 and the KL
exactly 0, and the run asserts it. What watches over it is in selfcheck.py, guards.py and actions.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.data.records import Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.evaluation import text
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.functions import NONE
from rlhf_exp.rewards.source import by_gold, score
from rlhf_exp.rollout.engine import Rollout, generate, judged, spoken
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import PPORun
from rlhf_exp.stages import checkpoint, faults, microbatch, references, selfcheck
from rlhf_exp.stages.actions import Watch
from rlhf_exp.stages.actors import EMA, Actors, build_actors
from rlhf_exp.stages.checkpoint import Checkpoint, Keeper
from rlhf_exp.stages.context import ADAPTER, CHECKPOINTS, CRITIC, HEAD, HEAD_FILE, Context
from rlhf_exp.stages.experience import prepare, shape_scores
from rlhf_exp.stages.guards import Guards
from rlhf_exp.stages.optim import adamw, schedule
from rlhf_exp.stages.order import batch_of, minibatches
from rlhf_exp.stages.ptx import Demonstrations
from rlhf_exp.stages.references import References
from rlhf_exp.stages.selfcheck import SAMPLER_TOLERANCE, TOLERANCE
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import update

SHOW = (
    ("objective/scores", "score", ".2f"),
    ("objective/gold", "gold", ".2f"),
    ("objective/kl", "KL", ".2f"),
    ("response/length_mean", "length", ".1f"),
    ("response/eos_rate", "EOS", ".2f"),
    ("tokens_per_second", "tok/s", ".0f"),
)
SAMPLES = 4  # answers an iteration written to samples.jsonl
SAMPLE = ("prompt", "response", "score", "ended")  # and what of each


@dataclass
class Carried:
    """What iterations share beside the actors: the state that changes, and what is read once."""

    state: State
    references: References
    demonstrations: Demonstrations | None = None
    guards: Guards = field(default_factory=Guards)

    def to_dict(self) -> dict[str, Any]:
        """What changes, for a checkpoint."""
        return {
            "state": self.state.to_dict(),
            "references": dict(self.references.known),
            "guards": self.guards.to_dict(),
        }


def run(config: PPORun, context: Context) -> dict[str, float]:
    """Train the policy; publish its adapter, the value head, and an adapter every `save_every` iterations."""
    references.require(config)
    faults.require(config.ppo.faults)
    faults.require_effect(config, context.adapter("sft") is not None)
    faults.announce(config.ppo)
    torch.manual_seed(config.seed)
    prompts, tokens = context.read(config.dataset, "prompts", "train")
    config = microbatch.settle(config, context, tokens.prompts)
    ppo = config.ppo
    demonstrations = Demonstrations.load(config, context)
    with Roles(context.base, config.memory.gradient_checkpointing) as roles:
        actors = build_actors(config, context, roles)
        optimizer = adamw(actors.groups(ppo), config.optim, config.strategy)
        scheduler = schedule(optimizer, config.optim, ppo.steps)
        found = checkpoint.newest(context)
        carried = carried_from(found, config, context, demonstrations)
        selfcheck.run(config, context, actors, prompts, tokens.prompts)
        watch = Watch(config, context, actors, optimizer, scheduler, carried.state, carried.guards)
        parts = trained(actors), optimizer, scheduler
        if found.step:
            checkpoint.put_back(found.tree, *parts)
        last = found.step if carried.guards.stopped else ppo.steps
        with (
            context.log("ppo", ppo.steps, SHOW, found) as log,
            Keeper(context, last, log, lambda: checkpoint.state_of(*parts) | carried.to_dict()) as keeper,
        ):
            for step in range(found.step + 1, last + 1):
                chosen = batch_of(len(prompts), ppo.batch_size, config.seed, step)
                chosen = [i for i in chosen for _ in range(ppo.samples_per_prompt)]
                asked, encoded = [prompts[i] for i in chosen], [tokens.prompts[i] for i in chosen]
                watch.begin()
                try:
                    metrics, answers = iterate(config, actors, optimizer, step, asked, encoded, carried)
                except FloatingPointError as error:
                    metrics, answers = watch.failed(error), []
                metrics["optim/lr"] = scheduler.get_last_lr()[0]
                if ppo.critic_lr is not None:
                    metrics["optim/critic_lr"] = scheduler.get_last_lr()[-1]
                metrics |= watch.after(step, metrics, asked, encoded, answers)
                scheduler.step()
                log.step(step, metrics | (tokens.cuts.metrics() if step == 1 else {}))
                log.samples(step, [{k: a[k] for k in SAMPLE} for a in answers[:SAMPLES]])
                if step % ppo.save_every == 0 and step < ppo.steps:
                    publish(context, actors, f"{CHECKPOINTS}/step_{step:05d}")
                keeper.after(step, last=bool(carried.guards.stopped))
                if carried.guards.stopped:
                    break
        publish_all(context, actors)
        return watch.finish()


def carried_from(
    found: Checkpoint, config: PPORun, context: Context, demonstrations: Demonstrations | None
) -> Carried:
    """What iterations share, as the checkpoint has it."""
    if not found.step:
        state = State.start(config.ppo, context.base.device)
        return Carried(state, References(config), demonstrations)
    return Carried(
        State.from_dict(found.tree["state"], context.base.device),
        References(config, found.tree["references"]),
        demonstrations,
        Guards.from_dict(found.tree["guards"]),
    )


def trained(actors: Actors) -> dict[str, list[Tensor]]:
    """All weights that training changes."""
    parts = {"policy": actors.roles.parameters("policy"), "critic": actors.critic_parameters()}
    return parts | ({EMA: actors.roles.parameters(EMA)} if actors.ema else {})


def publish(context: Context, actors: Actors, name: str, role: str = "policy") -> None:
    with context.folder.publish(name) as folder:
        actors.roles.save(role, folder)


def publish_all(context: Context, actors: Actors) -> None:
    """The policy, its average where there is one, and the critic."""
    publish(context, actors, ADAPTER)
    if actors.ema:
        publish(context, actors, EMA, EMA)
    if actors.critic != "policy":  # the value head is of no use without the adapter whose states it reads
        publish(context, actors, CRITIC, actors.critic)
    if actors.value_head is not None:
        with context.folder.publish(HEAD) as folder:
            actors.value_head.save(folder / HEAD_FILE)


def iterate(
    config: PPORun,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    step: int,
    prompts: list[Prompt],
    encoded: list[list[int]],
    carried: Carried,
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """One iteration: rollout, scores, experience, updates. Returns its metrics and the answers."""
    ppo, base, state = config.ppo, actors.base, carried.state
    clock = [time.perf_counter()]

    rollout = generate(
        base, lambda: actors.roles.use("policy"), encoded, keys_of(config, step, prompts), config.generation
    )
    clock.append(time.perf_counter())

    scores, metrics = score_answers(config, actors, rollout, prompts)
    baseline = None
    if ppo.score_scaling == "reference":
        baseline = torch.tensor(carried.references.scores(actors, prompts, encoded), device=base.device)
        metrics["objective/score_minus_ref"] = float((scores - baseline).mean())
    shaped = shape_scores(ppo, state, scores, rollout, baseline)
    plan = minibatches(rollout, config, step)
    experience, found = prepare(config, actors, state, rollout, shaped, plan[0])
    metrics |= found
    clock.append(time.perf_counter())

    metrics |= update(
        config,
        actors,
        optimizer,
        state,
        rollout,
        experience,
        plan,
        carried.demonstrations,
        critic_only=step <= ppo.critic_warmup,
    )
    if step > ppo.critic_warmup:  # before, the policy stands where it started and its KL says nothing
        state.control(ppo, metrics["objective/kl"], len(prompts))
    if step == 1:
        check_start(metrics, base.dtype, faults.waived(ppo) | ({"kl"} if actors.ahead else set()))
    clock.append(time.perf_counter())

    texts = base.tokenizer.batch_decode(judged(rollout), skip_special_tokens=True)
    metrics |= response_metrics(rollout, texts)
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    metrics |= dict(zip(("time/rollout", "time/score", "time/update"), seconds, strict=True))
    metrics["tokens_per_second"] = sum(map(len, rollout.responses)) / sum(seconds)
    each = zip(prompts, texts, rollout.responses, scores.tolist(), rollout.ended, strict=True)
    return metrics, [
        {
            "prompt": prompt.prompt,
            "response": answer,
            "response_ids": list(ids),
            "score": value,
            "ended": ended,
        }
        for prompt, answer, ids, value, ended in each
    ]


def keys_of(config: PPORun, step: int, prompts: list[Prompt]) -> list[int]:
    """What decides each answer's noise. A prompt that comes again in the batch has another sample index."""
    seen: dict[int, int] = {}
    keys = []
    for prompt in prompts:
        seen[prompt.id] = seen.get(prompt.id, -1) + 1
        keys.append(row_key(config.seed, step, prompt.id, seen[prompt.id]))
    return keys


def score_answers(
    config: PPORun, actors: Actors, rollout: Rollout, prompts: list[Prompt]
) -> tuple[Tensor, dict[str, float]]:
    """Scores [B] as they come from the reward source, and their figures; of the gold scorer only its mean."""
    ppo, source, seen = config.ppo, config.reward_source, {}
    found = score(
        source,
        actors.roles,
        actors.reward_heads,
        rollout.prompts,
        faults.scored_ids(ppo, actors.base.tokenizer, judged(rollout)),
        ppo.micro_batch_size,
        seen,
        ppo.micro_batch_tokens,
    )
    scores = faults.scores(ppo, torch.tensor(found, device=actors.base.device))
    figures = {"objective/scores": scores.mean(), "objective/scores_std": scores.std(correction=0)}
    if source.gold != NONE:
        asked, limits = (
            [str(prompt.prompt) for prompt in prompts],
            (ppo.micro_batch_size, ppo.micro_batch_tokens),
        )
        gold = by_gold(
            source.gold, actors.roles, actors.reward_heads, rollout.prompts, judged(rollout), asked, *limits
        )
        figures["objective/gold"] = sum(gold) / len(gold)
    return scores, {name: float(value) for name, value in (figures | seen).items()}


def check_start(metrics: dict[str, float], dtype: torch.dtype, waived: Collection[str] = ()) -> None:
    """Raise InputError unless policy and reference were equal before the first update: KL 0, ratio 1.

    Anything else is a wrong reference or adapter, dropout, or a forward that differs between scoring and update.
    waived: checks left out, of kl, ratio and sampler.
    """
    allowed = TOLERANCE[dtype]
    wrong = []
    # "not <=": NaN is wrong too
    if "kl" not in waived and not metrics["objective/kl_max"] <= allowed:
        wrong.append(f"log-probs of policy and reference differ by {metrics['objective/kl_max']:.3g}, not 0")
    if "ratio" not in waived and not abs(metrics["first/ratio_max"] - 1) <= allowed:
        wrong.append(f"the largest probability ratio is {metrics['first/ratio_max']:.6g}, not 1")
    if "ratio" not in waived and not metrics["first/approxkl"] <= allowed:
        wrong.append(f"the KL of old and new log-probs is {metrics['first/approxkl']:.3g}, not 0")
    if "sampler" not in waived and not metrics["rollout/logprob_difference"] <= SAMPLER_TOLERANCE[dtype]:
        wrong.append(
            f"log-probs of sampler and scoring forward differ by {metrics['rollout/logprob_difference']:.3g}"
        )
    if wrong:
        raise InputError(
            f"PPO does not start where SFT ended (tolerance {allowed}): {'; '.join(wrong)}: look at adapters.sft, "
            "lora.dropout and model.dtype"
        )


def response_metrics(rollout: Rollout, texts: list[str]) -> dict[str, float]:
    """What the answers are like (evaluation/text.py); lengths in tokens without EOS."""
    found = text.measure(texts, spoken(rollout), rollout.ended)
    names = {"length": "length_mean"}
    return {f"response/{names.get(name, name)}": value for name, value in found.items()}
