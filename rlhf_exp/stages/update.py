"""The epochs of clipped updates over one rollout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms.kl import kl_divergence_estimate
from rlhf_exp.algorithms.masked import masked_sum, sequence_weights
from rlhf_exp.algorithms.ppo import policy_loss, value_loss
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.scoring import answer_logprobs, answers, chosen
from rlhf_exp.schema import PPO, PPORun
from rlhf_exp.stages import faults, ptx
from rlhf_exp.stages.actors import Actors, states, values
from rlhf_exp.stages.experience import Experience, Forward, padded, state_of
from rlhf_exp.stages.order import Plan
from rlhf_exp.stages.ptx import Demonstrations
from rlhf_exp.stages.state import State

EARLY_STOP = 1.5  # times target_kl, as in Spinning Up and TRL


def update(
    config: PPORun,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    state: State,
    rollout: Rollout,
    experience: Experience,
    plan: Plan,
    demonstrations: Demonstrations | None = None,
    critic_only: bool = False,
) -> dict[str, float]:
    """Go through the plan. Metrics are means over all minibatches; `first/*` is before any optimiser step."""
    ppo = config.ppo
    totals: list[dict[str, float]] = []
    for minibatch in (minibatch for epoch in plan for minibatch in epoch):
        found = accumulate(config, actors, rollout, experience, minibatch, critic_only)
        totals.append(found)
        state.updates += 1
        if ppo.target_kl is not None and not found["policy/approxkl"] <= EARLY_STOP * ppo.target_kl:
            optimizer.zero_grad(set_to_none=True)
            break
        # "not <=": NaN is skipped too
        found["policy/skipped"] = float(
            ppo.ratio_guard > 0 and not found["policy/ratio_mean"] <= ppo.ratio_guard
        )
        if found["policy/skipped"]:
            optimizer.zero_grad(set_to_none=True)
            continue
        if demonstrations is not None and not critic_only:
            found["ptx/loss"] = accumulate_ptx(ppo, actors, state, demonstrations, minibatch)
        distributed.sum_gradients(actors.trainable())
        norms = clip_gradients(actors, faults.max_grad_norm(ppo, config.optim.max_grad_norm))
        if not all(
            map(math.isfinite, norms.values())
        ):  # guards.py sees the count, and what follows is in actions.py
            found["policy/nonfinite"] = 1.0
            optimizer.zero_grad(set_to_none=True)
            continue
        found |= norms
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not critic_only:
            actors.average(ppo.ema_decay)
    return summary(totals)


def clip_gradients(actors: Actors, norm: float) -> dict[str, float]:
    """Scale gradients to at most `norm`, and their norms before: policy and critic each, where they share no trunk.

    A critic far from its targets has gradients many times the policy's: under one joint norm the policy would stand
    still until it has learned.
    """
    parts = {"policy/grad_norm": actors.trainable()}
    if actors.value_head is not None and (actors.critic != "policy" or actors.detached):
        parts = {
            "policy/grad_norm": actors.roles.parameters("policy"),
            "critic/grad_norm": actors.critic_parameters(),
        }
    clip = torch.nn.utils.clip_grad_norm_
    return {name: float(clip(parameters, norm)) for name, parameters in parts.items()}


def summary(totals: list[dict[str, float]]) -> dict[str, float]:
    """Means over the minibatches that have the figure, of those gone through."""
    names = dict.fromkeys(name for found in totals for name in found)
    values = {name: [found[name] for found in totals if name in found] for name in names}
    metrics = {name: sum(found) / len(found) for name, found in values.items()}
    metrics["policy/ratio_max"] = max(values["policy/ratio_max"])
    metrics["policy/skipped"] = sum(values.get("policy/skipped", []))
    metrics["policy/nonfinite"] = sum(values.get("policy/nonfinite", []))
    metrics.setdefault("policy/grad_norm", 0.0)  # no minibatch made a step
    metrics["first/ratio_max"] = totals[0]["policy/ratio_max"]
    metrics["first/approxkl"] = totals[0]["policy/approxkl"]
    metrics["optim/updates"] = float(len(values.get("policy/grad_norm", [])))
    return metrics


def accumulate(
    config: PPORun,
    actors: Actors,
    rollout: Rollout,
    experience: Experience,
    minibatch: list[list[int]],
    critic_only: bool,
) -> dict[str, float]:
    """The gradient of a minibatch, micro-batch by micro-batch, and its figures."""
    rows = [row for rows in minibatch for row in rows]
    sequences = torch.tensor(len(rows), device=experience.mask.device)
    denominator = experience.mask[rows].sum() if config.ppo.loss_mean == "token" else sequences
    found: dict[str, float] = {"policy/ratio_max": 0.0}
    first = experience.take_first(distributed.mine(minibatch), state_of(actors))
    for rows, counts in distributed.turns(minibatch, actors.base.in_shards):
        loss, shares, ratio_max = loss_of(
            config, actors, rollout, experience, rows, denominator, critic_only, first
        )
        (loss if counts else 0 * loss).backward()
        if not counts:
            continue
        for name, share in shares.items():
            found[name] = found.get(name, 0.0) + float(share)
        found["policy/ratio_max"] = max(found["policy/ratio_max"], float(ratio_max))
    highest = distributed.highest(found.pop("policy/ratio_max"))
    return {"policy/ratio_max": highest} | distributed.add(found)


def accumulate_ptx(
    ppo: PPO, actors: Actors, state: State, demonstrations: Demonstrations, minibatch: list[list[int]]
) -> float:
    """Add ptx_coef times the gradient of the demonstrations' loss; the loss itself."""
    size = max(1, round(ppo.ptx_ratio * sum(map(len, minibatch))))
    total = 0.0
    rows = demonstrations.batch(state.updates, size)
    for loss in ptx.losses(actors, demonstrations, rows, ppo.micro_batch_size, ppo.micro_batch_tokens):
        (ppo.ptx_coef * loss).backward()
        total += float(loss.detach())
    return distributed.add({"loss": total})["loss"]


def loss_of(
    config: PPORun,
    actors: Actors,
    rollout: Rollout,
    experience: Experience,
    rows: list[int],
    denominator: Tensor,
    critic_only: bool = False,
    first: Forward | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One joint loss of policy and critic for a micro-batch: its share of a mean with this denominator.

    first: the forward of these rows, where it was done already. Returns the loss, the shares of the figures (they
    add over micro-batches), and the largest ratio.
    """
    ppo = config.ppo
    batch = answers(rollout, rows, actors.base)
    old = experience.of(batch.rows)
    mask = batch.steps
    weights = sequence_weights(mask) if ppo.loss_mean == "sequence" else None

    def mean(x: Tensor) -> Tensor:
        return masked_sum(x if weights is None else x * weights, mask) / denominator

    entropic = ppo.entropy_coef > 0 and not critic_only
    hidden, read = states(actors, batch) if first is None else (first.hidden, first.read)
    now = (
        answer_logprobs(actors.base, hidden, batch, config.generation, entropic, entropy=False)
        if first is None
        else first.now
    )
    value = values(actors, read, detached=critic_only)
    logprobs = padded(chosen(now.logprobs, batch), mask)
    policy = policy_loss(
        logprobs,
        old.logprobs,
        old.advantages,
        mask,
        ppo.cliprange,
        ppo.cliprange if ppo.cliprange_high is None else ppo.cliprange_high,
        denominator,
        weights,
        ppo.dual_clip,
    )
    shares = {
        "policy/loss": policy.loss.detach(),
        "policy/approxkl": policy.approxkl,
        "policy/clipfrac": policy.clipfrac,
        "policy/ratio_mean": policy.ratio_mean,
    }
    loss = torch.zeros_like(policy.loss) if critic_only else policy.loss
    if entropic:
        loss = loss - ppo.entropy_coef * mean(padded(chosen(now.entropy, batch), mask))
    if ppo.kl_in == "loss" and not critic_only:
        kl = kl_divergence_estimate(logprobs, old.ref_logprobs, ppo.kl_estimator, mask)
        loss = loss + ppo.kl_coef * mean(kl)
        shares["policy/kl_loss"] = mean(kl).detach()
    if value is not None:
        critic = value_loss(
            padded(chosen(value, batch), mask),
            old.values,
            old.returns,
            mask,
            ppo.cliprange_value,
            denominator,
            weights,
        )
        loss = loss + ppo.vf_coef * critic.loss
        shares |= {"critic/loss": critic.loss.detach(), "critic/clipfrac": critic.clipfrac}
    return loss, shares, policy.ratio_max
