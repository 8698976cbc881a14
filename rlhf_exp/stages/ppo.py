"""PPO with LoRA on one frozen base (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    sample answers -> score them -> log-probs and values of policy, log-probs of ref -> per-token rewards
    -> advantages -> a few epochs of clipped updates

The old log-probs come from the same forward, in the same micro-batches, as the first epoch's new ones, and the
reference's likewise: before the first update the ratio is exactly 1 and the KL exactly 0, and the run asserts it.
Left out here: adaptive KL, reward normalisation, guards, resume.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.gae import gae
from rlhf_exp.algorithms.kl import kl_divergence_estimate, kl_rewards
from rlhf_exp.algorithms.masked import Moments, masked_mean, masked_sum, whiten
from rlhf_exp.algorithms.ppo import explained_variance, policy_loss, value_loss
from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Prompt
from rlhf_exp.data.templates import Cuts, encode_prompts
from rlhf_exp.evaluation import text
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.source import score
from rlhf_exp.rollout.engine import Rollout, generate, spoken
from rlhf_exp.rollout.noise import row_key, splitmix
from rlhf_exp.rollout.scoring import answer_logprobs, answers, by_length, hidden_before
from rlhf_exp.schema import PPORun
from rlhf_exp.stages.actors import Actors, build_actors, policy_and_value
from rlhf_exp.stages.context import ADAPTER, CHECKPOINTS, CRITIC, HEAD, HEAD_FILE, Context
from rlhf_exp.stages.optim import adamw, schedule

SHOW = (
    ("objective/scores", "score", ".2f"),
    ("objective/kl", "KL", ".2f"),
    ("response/length_mean", "length", ".1f"),
    ("response/eos_rate", "EOS", ".2f"),
    ("tokens_per_second", "tok/s", ".0f"),
)
SAMPLES = 4  # answers an iteration written to samples.jsonl
# the most that log-probs of equal weights may differ before the first update: 0 in fp32 (same kernels, same
# shapes); in bf16 kernels may accumulate in another order with gradients on
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.05}
# the mean difference of the sampler's log-probs (cached decoding) and the scoring forward's, whose kernels differ
SAMPLER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Experience(NamedTuple):
    """What the update learns from; [B, T] over answer tokens, zero where `mask` is False."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor


def run(config: PPORun, context: Context) -> dict[str, float]:
    """Train the policy; publish its adapter, the value head, and an adapter every `save_every` iterations."""
    torch.manual_seed(config.seed)
    cuts = Cuts()
    prompts = load_view(config.dataset, "prompts", "train")
    encoded = encode_prompts(context.base.tokenizer, config.dataset, [p.prompt for p in prompts], cuts)
    with Roles(context.base) as roles:
        actors = build_actors(config, context, roles)
        optimizer = adamw(actors.trainable(), config.optim)
        scheduler = schedule(optimizer, config.optim, config.ppo.steps)
        with context.log("ppo", config.ppo.steps, SHOW) as log:
            for step in range(1, config.ppo.steps + 1):
                chosen = batch_of(len(prompts), config.ppo.batch_size, config.seed, step)
                metrics, samples = iterate(
                    config,
                    actors,
                    optimizer,
                    step,
                    [prompts[i] for i in chosen],
                    [encoded[i] for i in chosen],
                )
                metrics["optim/lr"] = scheduler.get_last_lr()[0]
                scheduler.step()
                log.step(step, metrics | ({"data/prompts_cut": float(cuts.prompts_cut)} if step == 1 else {}))
                log.samples(step, samples)
                if step % config.ppo.save_every == 0 and step < config.ppo.steps:
                    publish(context, actors, f"{CHECKPOINTS}/step_{step:05d}")
        publish(context, actors, ADAPTER)
        if actors.critic != "policy":  # the value head is of no use without the adapter whose states it reads
            with context.folder.publish(CRITIC) as folder:
                roles.save(actors.critic, folder)
        with context.folder.publish(HEAD) as folder:
            actors.value_head.save(folder / HEAD_FILE)
    return {name: metrics[name] for name in ("objective/scores", "objective/kl", "response/length_mean")}


def publish(context: Context, actors: Actors, name: str) -> None:
    with context.folder.publish(name) as folder:
        actors.roles.save("policy", folder)


def batch_of(count: int, size: int, seed: int, step: int) -> list[int]:
    """The prompts of iteration `step` (from 1): consecutive pieces of one shuffle an epoch, from the seed alone."""
    places = range((step - 1) * size, step * size)
    orders = {epoch: _shuffle(count, seed, epoch) for epoch in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places]


def _shuffle(count: int, seed: int, *keys: int) -> list[int]:
    for key in keys:
        seed = splitmix(seed ^ key)
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    return torch.randperm(count, generator=generator).tolist()


def iterate(
    config: PPORun,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    step: int,
    prompts: list[Prompt],
    encoded: list[list[int]],
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """One iteration: rollout, scores, experience, updates. Returns its metrics and some samples."""
    ppo, base = config.ppo, actors.base
    clock = [time.perf_counter()]

    # a prompt can come twice in a batch that crosses an epoch: it then has another sample index
    seen: dict[int, int] = {}
    keys = []
    for prompt in prompts:
        seen[prompt.id] = seen.get(prompt.id, -1) + 1
        keys.append(row_key(config.seed, step, prompt.id, seen[prompt.id]))
    rollout = generate(base, lambda: actors.roles.use("policy"), encoded, keys, config.generation)
    clock.append(time.perf_counter())

    scores = torch.tensor(
        score(
            config.reward_source,
            actors.roles,
            actors.reward_head,
            rollout.prompts,
            rollout.responses,
            ppo.micro_batch_size,
        ),
        device=base.device,
    )
    plan = minibatches(rollout, config, step)
    experience, metrics = prepare(config, actors, rollout, scores, plan[0])
    clock.append(time.perf_counter())

    metrics |= update(config, actors, optimizer, rollout, experience, plan)
    if step == 1:
        check_start(metrics, base.dtype)
    clock.append(time.perf_counter())

    texts = base.tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    metrics |= response_metrics(rollout, texts)
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    metrics |= dict(zip(("time/rollout", "time/score", "time/update"), seconds, strict=True))
    metrics["tokens_per_second"] = sum(map(len, rollout.responses)) / sum(seconds)
    samples = [
        {"prompt": prompt.prompt, "response": answer, "score": value, "ended": ended}
        for prompt, answer, value, ended in zip(prompts, texts, scores.tolist(), rollout.ended, strict=True)
    ]
    return metrics, samples[:SAMPLES]


def minibatches(rollout: Rollout, config: PPORun, step: int) -> list[list[list[list[int]]]]:
    """Rows of every micro-batch of every minibatch of every epoch: plan[epoch][minibatch][micro-batch]."""
    ppo, count = config.ppo, len(rollout.prompts)
    size = count // ppo.minibatches
    plan = []
    for epoch in range(ppo.epochs):
        order = _shuffle(count, config.seed, step, epoch)
        pieces = [order[start : start + size] for start in range(0, count, size)]
        plan.append([by_length(rollout, piece, ppo.micro_batch_size) for piece in pieces])
    return plan


@torch.no_grad()
def prepare(
    config: PPORun, actors: Actors, rollout: Rollout, scores: Tensor, epoch: list[list[list[int]]]
) -> tuple[Experience, dict[str, float]]:
    """Old log-probs, values and advantages of the whole batch, in the micro-batches of the first epoch."""
    ppo, base = config.ppo, actors.base
    everything = answers(rollout, range(len(rollout.prompts)), base)
    mask = everything.mask
    logprobs, ref_logprobs, values = (torch.zeros(mask.shape, device=base.device) for _ in range(3))
    entropy = torch.zeros(mask.shape, device=base.device)
    kept_mass = torch.zeros(mask.shape, device=base.device)
    for rows in (rows for minibatch in epoch for rows in minibatch):
        batch = answers(rollout, rows, base)
        hidden, value = policy_and_value(actors, batch)
        now = answer_logprobs(base, hidden, batch, config.generation)
        ref_hidden = hidden_before(actors.roles, actors.ref, batch)
        ref = answer_logprobs(base, ref_hidden, batch, config.generation)
        for whole, part in (
            (logprobs, now.logprobs),
            (ref_logprobs, ref.logprobs),
            (values, value),
            (entropy, now.entropy),
            (kept_mass, now.kept_mass),
        ):
            whole[batch.rows] = padded(part, batch.mask)

    shaped = shape_scores(config, scores, rollout.ended)
    kl = torch.where(mask, kl_divergence_estimate(logprobs, ref_logprobs, ppo.kl_estimator), 0)
    rewards = kl_rewards(shaped, kl, mask, ppo.kl_coef)
    advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.lam)
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask, Moments.of(advantages, mask))
    sampled = torch.cat(rollout.logprobs).to(base.device)
    metrics = {
        # of the sampled tokens, so an estimate of the answers' KL; nats an answer
        "objective/kl": masked_sum(logprobs - ref_logprobs, mask) / len(scores),
        "objective/kl_max": (logprobs - ref_logprobs).abs().max(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/rewards": rewards.sum() / len(scores),
        "objective/entropy": masked_mean(entropy, mask),
        "critic/explained_variance": explained_variance(values, returns, mask),
        "response/kept_mass": masked_mean(kept_mass, mask),
        "rollout/logprob_difference": (logprobs[mask] - sampled).abs().mean(),
        "rollout/logprob_difference_max": (logprobs[mask] - sampled).abs().max(),
    }
    experience = Experience(logprobs, values, advantages, returns, mask)
    return experience, {name: float(value) for name, value in metrics.items()}


def shape_scores(config: PPORun, scores: Tensor, ended: list[bool]) -> Tensor:
    """Clip the scores [B] and subtract the penalty for answers that never ended."""
    if config.ppo.reward_clip > 0:
        scores = scores.clamp(-config.ppo.reward_clip, config.ppo.reward_clip)
    return scores - config.ppo.missing_eos_penalty * (~torch.tensor(ended, device=scores.device)).float()


def padded(x: Tensor, mask: Tensor) -> Tensor:
    """[N] over the True places of `mask` [b, T] -> [b, T], zero elsewhere."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)


def update(
    config: PPORun,
    actors: Actors,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    experience: Experience,
    plan: list[list[list[list[int]]]],
) -> dict[str, float]:
    """The epochs of clipped updates. Metrics are means over all optimiser steps; `first/*` is before any."""
    ppo = config.ppo
    totals: list[dict[str, float]] = []
    for epoch in plan:
        for minibatch in epoch:
            tokens = experience.mask[[row for rows in minibatch for row in rows]].sum()
            found: dict[str, float] = {"policy/ratio_max": 0.0}
            for rows in minibatch:
                loss, shares, ratio_max = loss_of(config, actors, rollout, experience, rows, tokens)
                loss.backward()
                for name, share in shares.items():
                    found[name] = found.get(name, 0.0) + float(share)
                found["policy/ratio_max"] = max(found["policy/ratio_max"], float(ratio_max))
            norm = torch.nn.utils.clip_grad_norm_(actors.trainable(), config.optim.max_grad_norm)
            found["policy/grad_norm"] = float(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            totals.append(found)
    metrics = {name: sum(found[name] for found in totals) / len(totals) for name in totals[0]}
    metrics["policy/ratio_max"] = max(found["policy/ratio_max"] for found in totals)
    metrics["first/ratio_max"] = totals[0]["policy/ratio_max"]
    metrics["first/approxkl"] = totals[0]["policy/approxkl"]
    metrics["optim/updates"] = float(ppo.epochs * ppo.minibatches)
    return metrics


def loss_of(
    config: PPORun,
    actors: Actors,
    rollout: Rollout,
    experience: Experience,
    rows: list[int],
    tokens: Tensor,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One joint loss of policy and critic for a micro-batch, its share of a mean over `tokens` tokens."""
    ppo = config.ppo
    batch = answers(rollout, rows, actors.base)
    old = Experience(*(part[batch.rows] for part in experience))
    hidden, value = policy_and_value(actors, batch)
    now = answer_logprobs(actors.base, hidden, batch, config.generation)
    policy = policy_loss(
        padded(now.logprobs, batch.mask),
        old.logprobs,
        old.advantages,
        batch.mask,
        ppo.cliprange,
        ppo.cliprange,
        tokens,
    )
    critic = value_loss(
        padded(value, batch.mask), old.values, old.returns, batch.mask, ppo.cliprange_value, tokens
    )
    shares = {
        "policy/loss": policy.loss.detach(),
        "policy/approxkl": policy.approxkl,
        "policy/clipfrac": policy.clipfrac,
        "policy/ratio_mean": policy.ratio_mean,
        "critic/loss": critic.loss.detach(),
        "critic/clipfrac": critic.clipfrac,
    }
    return policy.loss + ppo.vf_coef * critic.loss, shares, policy.ratio_max


def check_start(metrics: dict[str, float], dtype: torch.dtype) -> None:
    """Raise RuntimeError unless policy and reference were equal before the first update: KL 0, ratio 1.

    Anything else is a wrong reference or adapter, dropout, or a forward that differs between scoring and update.
    """
    allowed = TOLERANCE[dtype]
    wrong = []
    # "not <=": NaN is wrong too
    if not metrics["objective/kl_max"] <= allowed:
        wrong.append(f"log-probs of policy and reference differ by {metrics['objective/kl_max']:.3g}, not 0")
    if not abs(metrics["first/ratio_max"] - 1) <= allowed:
        wrong.append(f"the largest probability ratio is {metrics['first/ratio_max']:.6g}, not 1")
    if not metrics["first/approxkl"] <= allowed:
        wrong.append(f"the KL of old and new log-probs is {metrics['first/approxkl']:.3g}, not 0")
    if not metrics["rollout/logprob_difference"] <= SAMPLER_TOLERANCE[dtype]:
        wrong.append(
            f"log-probs of sampler and scoring forward differ by {metrics['rollout/logprob_difference']:.3g}"
        )
    if wrong:
        raise RuntimeError(f"PPO does not start where SFT ended (tolerance {allowed}): " + "; ".join(wrong))


def response_metrics(rollout: Rollout, texts: list[str]) -> dict[str, float]:
    """What the answers are like (evaluation/text.py); lengths in tokens without EOS."""
    found = text.measure(texts, spoken(rollout), rollout.ended)
    names = {"length": "length_mean"}
    return {f"response/{names.get(name, name)}": value for name, value in found.items()}
