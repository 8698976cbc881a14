"""PPO written out plainly, by the definitions: one row at a time, full logits, no padding, no accumulation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from rlhf_exp.algorithms.support import Support
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.schema import PPORun
from rlhf_exp.stages import experience, order, ppo
from rlhf_exp.stages.actors import Actors
from rlhf_exp.stages.references import References
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import update

ROWS = 8
PROMPTS = (3, 9, 1, 6, 6, 2, 12, 4)  # lengths
LENGTHS = (5, 1, 3, 6, 2, 6, 4, 1)  # of the answers, EOS included where they end
SCORES = torch.tensor([0.3, -1.2, 4.0, 0.0, 2.0, -0.5, 1.0, 0.7])
REFERENCES = torch.tensor([0.5, 0.5, -1.0, 2.0, 0.0, 0.1, 3.0, -0.4])  # scores of human references


def make_rollout(eos_id: int) -> Rollout:
    """Answers of one to six random tokens; some end."""
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 512, (n,), generator=draw).tolist() for n in PROMPTS]
    responses = [torch.randint(3, 512, (n,), generator=draw).tolist() for n in LENGTHS]
    ended = [i % 2 == 0 for i in range(ROWS)]
    for response, ends in zip(responses, ended, strict=True):
        if ends and len(response) > 1:
            response[-1] = eos_id
    ended = [response[-1] == eos_id for response in responses]
    return Rollout(prompts, responses, ended, [torch.zeros(n) for n in LENGTHS], None)


def with_supports(rollout: Rollout) -> Rollout:
    """The same answers, each token as if drawn from itself and thirty others."""
    draw, supports = torch.Generator().manual_seed(9), []
    for response in rollout.responses:
        kept = [sorted({token, *torch.randint(3, 512, (30,), generator=draw).tolist()}) for token in response]
        supports.append(
            Support(
                torch.tensor([i for ids in kept for i in ids], dtype=torch.int32),
                torch.tensor([len(ids) for ids in kept]),
            )
        )
    return rollout._replace(supports=supports)


# ---------------------------------------------------------------- our side


def prepare(config: PPORun, actors: Actors, rollout: Rollout, scores, epoch, state: State | None = None):
    """Experience from scores as they come; the state, unless given, has seen nothing."""
    state = state or State.start(config.ppo)
    shaped = experience.shape_scores(config.ppo, state, scores, rollout, REFERENCES)
    return experience.prepare(config, actors, state, rollout, shaped, epoch)


def prompts_of() -> tuple[list[SimpleNamespace], list[list[int]]]:
    """Eight prompts of different lengths and their ids."""
    draw = torch.Generator().manual_seed(4)
    encoded = [torch.randint(3, 512, (n,), generator=draw).tolist() for n in PROMPTS]
    return [SimpleNamespace(id=i, prompt=str(i), reference=f"answer {i}") for i in range(ROWS)], encoded


def iterate(config: PPORun, actors: Actors, step: int = 1, carried: ppo.Carried | None = None, lr=1e-2):
    """One iteration on `prompts_of()`, each asked `samples_per_prompt` times; its metrics."""
    k = config.ppo.samples_per_prompt
    prompts, encoded = ([x for x in rows for _ in range(k)] for rows in prompts_of())
    optimizer = torch.optim.SGD(actors.trainable(), lr=lr)
    carried = carried or ppo.Carried(State.start(config.ppo), References(config))
    return ppo.iterate(config, actors, optimizer, step, prompts, encoded, carried)[0]


def gradients(actors: Actors) -> list[torch.Tensor]:
    """Of everything trainable, zeros where there is none; and clear them."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in actors.trainable()]
    for parameter in actors.trainable():
        parameter.grad = None
    return found


def nudge(actors: Actors, seed: int = 0) -> None:
    """Move everything trainable, as an update would: ratios leave 1, some the clip range."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in actors.trainable():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def updated(config, actors, rollout, move=True, **keywords):
    """The metrics of an update from a policy that has (or has not) left the rollout, and what moved."""
    plan = order.minibatches(rollout, config, step=1)
    given, _ = prepare(config, actors, rollout, SCORES, plan[0])
    if move:
        nudge(actors)
    before = [p.detach().clone() for p in actors.trainable()]
    optimizer = torch.optim.SGD(actors.trainable(), lr=0.05)
    metrics = update(config, actors, optimizer, State.start(config.ppo), rollout, given, plan, **keywords)
    assert all(p.grad is None for p in actors.trainable())
    moved = [not torch.equal(p, old) for p, old in zip(actors.trainable(), before, strict=True)]
    return metrics, moved


# ---------------------------------------------------------------- the same, plainly


def forward(actors: Actors, role, prompt, response):
    """Logits [T, V] and hidden states [T, d] before each token of one answer; nothing is padded."""
    with actors.roles.use(role):
        out = actors.base.model(
            input_ids=torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False
        )
    places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return out.logits[0, places], out.hidden_states[-1][0, places]


def log_probs(config: PPORun, actors: Actors, rollout: Rollout, row: int, logits):
    """Of the answer's tokens, under the distribution of the sampler: temperature, forbidden EOS, kept sets."""
    logits = logits / config.generation.temperature
    forbidden = torch.zeros(logits.shape, dtype=torch.bool)
    if rollout.supports is None:
        forbidden[: config.generation.min_new_tokens, actors.base.eos_id] = True
    else:
        ids, counts = rollout.supports[row]
        for t, kept in enumerate(ids.split(counts.tolist())):
            forbidden[t] = True
            forbidden[t, kept.long()] = False
    logits = logits.masked_fill(forbidden, -math.inf)
    chosen = torch.tensor(rollout.responses[row])[:, None]
    return (logits - logits.logsumexp(1, keepdim=True)).gather(1, chosen)[:, 0]


def plain_row(config, actors, rollout, row):
    """Log-probs and values of one answer."""
    prompt, response = rollout.prompts[row], rollout.responses[row]
    logits, hidden = forward(actors, "policy", prompt, response)
    if actors.critic != "policy":
        _, hidden = forward(actors, actors.critic, prompt, response)
    elif actors.detached:
        hidden = hidden.detach()
    logprobs = log_probs(config, actors, rollout, row, logits)
    if actors.value_head is None:
        return logprobs, torch.zeros(len(response))
    return logprobs, hidden @ actors.value_head.weight + actors.value_head.bias


def plain_entropy(config, actors, rollout, row):
    """- sum p log p at each token of an answer, of the distribution that was sampled from."""
    prompt, response = rollout.prompts[row], rollout.responses[row]
    logits, _ = forward(actors, "policy", prompt, response)
    found = []
    for t, at in enumerate(logits / config.generation.temperature):
        allowed = [
            i for i in range(len(at)) if i != actors.base.eos_id or t >= config.generation.min_new_tokens
        ]
        p = at[allowed].softmax(0)
        found.append(-(p * p.log()).sum())
    return torch.stack(found)


def plain_score(p, rollout: Rollout, scores, row: int) -> float:
    """What an answer is paid at its end."""
    score, everyone = float(scores[row]), [float(s) for s in scores]
    if p.score_scaling == "reference":
        score -= float(REFERENCES[row])
    if p.score_scaling == "running":
        mean = sum(everyone) / ROWS
        score = (score - mean) / (sum((s - mean) ** 2 for s in everyone) / ROWS) ** 0.5
    if p.reward_clip:
        score = max(-p.reward_clip, min(p.reward_clip, score))
    if not rollout.ended[row]:
        score = p.missing_eos_score if p.missing_eos == "score" else score - p.missing_eos_penalty
    return score - p.length_penalty * max(0, LENGTHS[row] - p.length_budget)


def kl_terms(p, log_r):
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - 1 - log_r}[p.kl_estimator]


def plain_gae(p, rewards: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    n, v = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + p.gamma * v[t + 1] - v[t] for t in range(n)]
    advantages = [sum((p.gamma * p.lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
    return advantages, [a + b for a, b in zip(advantages, values, strict=True)]


def plain_groups(p, totals: list[float]) -> list[float]:
    """One advantage an answer, of its total and those of the other answers to its prompt."""
    if p.estimator == "reinforce":
        return [total - sum(totals) / len(totals) for total in totals]
    found, k = [], p.samples_per_prompt
    for i, total in enumerate(totals):
        group = totals[i // k * k : i // k * k + k]
        mean = sum(group) / k
        if p.estimator == "rloo":
            found.append(total - (sum(group) - total) / (k - 1))
        else:
            std = (sum((x - mean) ** 2 for x in group) / k) ** 0.5
            found.append((total - mean) / (std + 1e-4))
    return found


def plain_experience(config: PPORun, actors: Actors, rollout: Rollout, scores) -> list[SimpleNamespace]:
    """Log-probs, values, rewards, advantages and returns of each answer, by the definitions."""
    rows, p = [], config.ppo
    for row in range(ROWS):
        with torch.no_grad():
            logprobs, values = plain_row(config, actors, rollout, row)
            ref_logits, _ = forward(actors, actors.ref, rollout.prompts[row], rollout.responses[row])
            ref = log_probs(config, actors, rollout, row, ref_logits)
        rewards = -p.kl_coef * kl_terms(p, ref - logprobs)
        if p.kl_in == "loss":
            rewards = torch.zeros_like(logprobs)
        rewards[-1] += plain_score(p, rollout, scores, row)
        rows.append(SimpleNamespace(logprobs=logprobs, ref=ref, values=values, rewards=rewards))
    if p.estimator != "gae":
        for row, worth in zip(rows, plain_groups(p, [float(row.rewards.sum()) for row in rows]), strict=True):
            row.advantages, row.returns = torch.full_like(row.values, worth), torch.zeros_like(row.values)
        return rows
    if p.whiten_rewards:
        everything = torch.cat([row.rewards for row in rows]).double()
        mean, std = everything.mean(), (everything.var(correction=0) + 1e-8).sqrt()
        for row in rows:
            row.rewards = ((row.rewards - mean) / std + mean).float()
    for row in rows:
        advantages, returns = plain_gae(p, row.rewards.tolist(), row.values.tolist())
        row.advantages, row.returns = torch.tensor(advantages), torch.tensor(returns)
    if p.whiten_advantages:
        everything = torch.cat([row.advantages for row in rows]).double()
        mean, std = everything.mean(), (everything.var(correction=0) + 1e-8).sqrt()
        for row in rows:
            row.advantages = ((row.advantages - mean) / std).float()
    return rows


def plain_loss(config, actors, rollout, experience, rows):
    """The joint loss of PPO of some answers: a mean over all their tokens, or over the answers' means."""
    p, policy, critic = config.ppo, [], []
    for row in rows:
        old = experience[row]
        logprobs, values = plain_row(config, actors, rollout, row)
        ratio, a = (logprobs - old.logprobs).exp(), old.advantages
        high = p.cliprange if p.cliprange_high is None else p.cliprange_high
        objective = torch.minimum(ratio * a, ratio.clip(1 - p.cliprange, 1 + high) * a)
        if p.dual_clip is not None:
            objective = torch.where(a < 0, torch.maximum(objective, p.dual_clip * a), objective)
        loss = -objective
        if p.kl_in == "loss":
            loss = loss + p.kl_coef * kl_terms(p, old.ref - logprobs)
        if p.entropy_coef:
            loss = loss - p.entropy_coef * plain_entropy(config, actors, rollout, row)
        policy.append(loss)
        if actors.value_head is None:
            critic.append(torch.zeros_like(loss))
            continue
        error = (values - old.returns) ** 2
        if p.cliprange_value is not None:
            near = old.values + (values - old.values).clip(-p.cliprange_value, p.cliprange_value)
            error = torch.maximum(error, (near - old.returns) ** 2)
        critic.append(error / 2)
    if p.loss_mean == "sequence":
        policy, critic = ([part.mean()[None] for part in parts] for parts in (policy, critic))
    return torch.cat(policy).mean() + p.vf_coef * torch.cat(critic).mean()
