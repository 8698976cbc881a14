"""From scored answers to what the update learns from: rewards, advantages, returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms import baselines
from rlhf_exp.algorithms.gae import GAE, gae
from rlhf_exp.algorithms.kl import kl_divergence_estimate, kl_rewards
from rlhf_exp.algorithms.logprob import LinearLogprobs
from rlhf_exp.algorithms.masked import Moments, masked_mean, masked_sum, whiten
from rlhf_exp.algorithms.ppo import explained_variance
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.sampler import reshapes
from rlhf_exp.rollout.scoring import answer_logprobs, answers, chosen, hidden_before, untruncated_kl
from rlhf_exp.schema import PPO, PPORun
from rlhf_exp.stages import faults
from rlhf_exp.stages.actors import Actors, states, values
from rlhf_exp.stages.state import State


class Forward(NamedTuple):
    """The policy's forward over one micro-batch, with its graph: what the losses of the micro-batch are made of."""

    rows: list[int]  # in the order of the forward
    hidden: Tensor  # [N, d]
    read: Tensor | None  # [N, d], the states that the value head reads; None: no critic
    now: LinearLogprobs
    weights: int  # the state of the trained weights it was done with


def state_of(actors: Actors) -> int:
    """Changes whenever a trained weight is written to."""
    return sum(parameter._version for parameter in actors.trainable())


class Experience(NamedTuple):
    """What the update learns from; [B, T] over the tokens that the policy chose, zero where `mask` is False.

    An EOS that a stop text put there is no action of the policy but what follows its last one: the episode ends with
    the token that completes the stop text, and the score lands there. In what is learned, and in every mean over
    tokens, that EOS is padding.

    Where the whole rollout is one micro-batch, the first update's forward is the one that the old log-probs and
    values come from. It is kept in `first`, for the update to take out once, and not computed twice.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor
    first: tuple[list[Forward], ...] = ()

    def of(self, rows: Tensor) -> Experience:
        """Some rows of the batch."""
        return Experience(*(part[rows] for part in self[:-1]))

    def take_first(self, minibatch: list[list[int]], weights: int) -> Forward | None:
        """The forward that is kept for this minibatch and these weights, if there is one; it is gone after that."""
        kept = self.first[0] if self.first else []
        found = kept.pop() if kept else None
        return found if found and [found.rows] == list(minibatch) and found.weights == weights else None


class Seen(NamedTuple):
    """What policy, reference and critic say of the answers; [B, T], zero where the policy chose no token."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    kept_mass: Tensor
    kl: Tensor  # exact, of the models' own distributions at temperature 1; 0 where the sampler draws from these


def shape_scores(
    ppo: PPO, state: State, scores: Tensor, rollout: Rollout, references: Tensor | None = None
) -> Tensor:
    """Scores [B] of the reward source -> what an answer is paid at its end.

    Scaled, clipped, then the rules for answers that never ended and for long ones; the running moments, which `state`
    keeps, include these scores. references [B] for score_scaling=reference.
    """
    if ppo.score_scaling == "reference":
        scores = scores - references
    elif ppo.score_scaling == "running":
        state.scores = state.scores.merge(Moments.of(scores, torch.ones_like(scores, dtype=torch.bool)))
        deviation = (state.scores.var() + 1e-8).sqrt()
        scores = ((scores.double() - state.scores.mean) / deviation).to(scores.dtype)
    if ppo.reward_clip > 0:
        scores = scores.clamp(-ppo.reward_clip, ppo.reward_clip)
    unended = ~torch.tensor(rollout.ended, device=scores.device)
    if ppo.missing_eos == "score":
        scores = torch.where(unended, ppo.missing_eos_score, scores)
    else:
        scores = scores - ppo.missing_eos_penalty * unended.float()
    # an EOS that a stop text put there was not chosen, so it costs nothing
    stops = rollout.stops or [None] * len(rollout.responses)
    sampled = [len(r) - (stop is not None) for r, stop in zip(rollout.responses, stops, strict=True)]
    lengths = torch.tensor(sampled, device=scores.device)
    return scores - ppo.length_penalty * (lengths - ppo.length_budget).clamp(min=0).float()


@torch.no_grad()
def look(
    config: PPORun,
    actors: Actors,
    rollout: Rollout,
    epoch: list[list[list[int]]],
    keep: list[Forward] | None = None,
) -> Seen:
    """Forward every answer, in the micro-batches of the first epoch, in which the update will do it again.

    Each rank does its own; all have all afterwards. With `keep` the policy's forwards are put there, each with its
    graph.
    """
    base = actors.base
    shape = answers(rollout, range(len(rollout.prompts)), base).mask.shape
    seen = Seen(*(torch.zeros(shape, device=base.device) for _ in Seen._fields))
    for rows, counts in (turn for some in epoch for turn in distributed.turns(some, base.in_shards)):
        batch = answers(rollout, rows, base)
        with torch.set_grad_enabled(keep is not None):
            hidden, read = states(actors, batch)
            entropic = keep is not None and config.ppo.entropy_coef > 0
            now = answer_logprobs(base, hidden, batch, config.generation, entropy_gradient=entropic)
        if keep is not None and counts:
            keep.append(Forward(rows, hidden, read, now, state_of(actors)))
        ref_hidden = faults.ref_hidden(config.ppo, hidden_before(actors.roles, actors.ref, batch))
        ref = answer_logprobs(base, ref_hidden, batch, config.generation, entropy=False)
        found = Seen(now.logprobs, ref.logprobs, values(actors, read), now.entropy, now.kept_mass, None)
        if not counts:
            continue
        if reshapes(config.generation):
            found = found._replace(kl=untruncated_kl(base, hidden.detach(), ref_hidden))
        for whole, part in zip(seen, found, strict=True):
            if part is not None:
                whole[batch.rows] = padded(chosen(part, batch), batch.steps)
    distributed.sum_tensors(seen)  # each row is one rank's, and 0 with the others
    return seen


@torch.no_grad()
def prepare(
    config: PPORun,
    actors: Actors,
    state: State,
    rollout: Rollout,
    scores: Tensor,
    epoch: list[list[list[int]]],
) -> tuple[Experience, dict[str, float]]:
    """Rewards, advantages and returns of the whole batch from the shaped scores [B]; and their metrics."""
    ppo, base = config.ppo, actors.base
    everything = answers(rollout, range(len(rollout.prompts)), base)
    mask = everything.steps
    # before the very first update the forwards of old and new log-probs stay two: check_start compares them
    once = len(epoch) == len(distributed.mine(epoch[0])) == 1
    keep = [] if once and state.updates > 0 else None
    seen = look(config, actors, rollout, epoch, keep)
    kl = kl_divergence_estimate(seen.logprobs, seen.ref_logprobs, ppo.kl_estimator, mask)
    rewards = kl_rewards(scores, kl, mask, state.kl_coef if ppo.kl_in == "reward" else 0.0)
    advantages, returns = estimate(ppo, state, rewards, scores, seen.values, mask)
    sampled = chosen(torch.cat(rollout.logprobs).to(base.device), everything)
    kept_mass = seen.kept_mass
    if rollout.masses is not None:  # logprob_mode=raw: only the sampler knows
        kept_mass = padded(chosen(torch.cat(rollout.masses).to(base.device), everything), mask)
    difference = (seen.logprobs[mask] - sampled).abs()
    log_ratio = seen.logprobs - seen.ref_logprobs
    metrics = {
        # of the sampled tokens, so an estimate of the answers' KL; nats an answer
        "objective/kl": masked_sum(log_ratio, mask) / len(scores),
        "objective/kl_max": log_ratio.abs().max(),
        "objective/kl_coef": state.kl_coef,
        "objective/rewards": rewards.sum() / len(scores),
        "objective/entropy": faults.mean_entropy(ppo, seen.entropy, seen.logprobs, mask),
        "response/kept_mass": masked_mean(kept_mass, mask),
        "rollout/logprob_difference": difference.mean(),
        "rollout/logprob_difference_max": difference.max(),
    }
    if reshapes(config.generation):
        metrics["objective/kl_untruncated"] = seen.kl.sum() / len(scores)
    if actors.value_head is not None:
        metrics["critic/explained_variance"] = explained_variance(seen.values, returns, mask)
    first = () if keep is None else (keep,)
    experience = Experience(seen.logprobs, seen.ref_logprobs, seen.values, advantages, returns, mask, first)
    return experience, {name: float(value) for name, value in metrics.items()}


def estimate(ppo: PPO, state: State, rewards: Tensor, scores: Tensor, values: Tensor, mask: Tensor) -> GAE:
    """Advantages and returns [B, T] by `ppo.estimator`, zero on padding."""
    if ppo.estimator == "gae":
        paid = rewards
        if ppo.whiten_rewards:
            rewards = whiten(paid, mask, shift_mean=False)
        rewards, steps = faults.reward_place(ppo, rewards, paid, scores, mask)
        advantages, returns = (
            torch.where(mask, x, 0) for x in gae(rewards, values, steps, ppo.gamma, ppo.lam)
        )
        return GAE(faults.whiten(ppo, advantages, mask) if ppo.whiten_advantages else advantages, returns)
    totals = rewards.sum(dim=1)
    if ppo.estimator == "rloo":
        worth = baselines.rloo(totals, ppo.samples_per_prompt)
    elif ppo.estimator == "grpo":
        worth = baselines.grpo(totals, ppo.samples_per_prompt)
    else:
        worth = baselines.reinforce(totals, state.returns)
        state.returns = state.returns.merge(Moments.of(totals, torch.ones_like(totals, dtype=torch.bool)))
    # an answer is one action: all of its tokens have its advantage
    return GAE(torch.where(mask, worth.unsqueeze(1), 0), torch.zeros_like(values))


def padded(x: Tensor, mask: Tensor) -> Tensor:
    """[N] over the True places of `mask` [b, T] -> [b, T], zero elsewhere."""
    return torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)
