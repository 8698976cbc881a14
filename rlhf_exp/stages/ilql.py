"""ILQL with LoRA on the frozen base (Snell et al. 2022): learn Q and V from scored answers, then decode with them.

    score the data's answers -> for each batch: Bellman, expectile, conservative and likelihood losses in one
    -> evaluate softmax(logits + beta * (Q - V)) for a list of betas

The policy's adapter starts from SFT's; Q and V are heads on its hidden states, and all losses train the adapter. Left
out: the paper's per-utterance variant and its policy that is not trained along with Q.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms import ilql as algorithm
from rlhf_exp.algorithms.logprob import linear_logprobs
from rlhf_exp.data.load import statistics
from rlhf_exp.errors import InputError
from rlhf_exp.model.ilql_heads import ILQLHeads
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.rewards.source import score
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.rollout.scoring import Answers, answers, dealt, hidden_before
from rlhf_exp.schema import GOLD, LEARNED, ILQLRun, RFTRun, proxies
from rlhf_exp.stages import checkpoint, microbatch, supervised
from rlhf_exp.stages.actors import Heads, load_reward_models
from rlhf_exp.stages.checkpoint import Keeper
from rlhf_exp.stages.context import ADAPTER, HEADS_FILE, ILQL, Context
from rlhf_exp.stages.experience import padded
from rlhf_exp.stages.ilql_eval import evaluate
from rlhf_exp.stages.optim import adamw, schedule
from rlhf_exp.stages.order import piece_of
from rlhf_exp.stages.written import rows_of, written

SHOW = (
    ("ilql/q_loss", "Q", ".3f"),
    ("ilql/v_loss", "V", ".3f"),
    ("ilql/cql_loss", "CQL", ".2f"),
    ("ilql/awac_loss", "LM", ".2f"),
    ("tokens_per_second", "tok/s", ".0f"),
)


class Data(NamedTuple):
    """The answers to learn from, in the form of a rollout, and the reward [rows] that each one's end brings."""

    rollout: Rollout
    rewards: Tensor
    metrics: dict[str, float]

    def rows(self, rows: Sequence[int]) -> Data:
        """A few of them: what collates a batch looks at every answer it is given."""
        return Data(rows_of(self.rollout, rows), self.rewards[list(rows)], {})


class Losses(NamedTuple):
    """Shares of a micro-batch in means over the batch's tokens."""

    q: Tensor  # of both twins together
    v: Tensor
    cql: Tensor
    awac: Tensor


def run(config: ILQLRun, context: Context) -> dict[str, float]:
    """Train adapter and heads; publish both; report the decoding for every beta."""
    torch.manual_seed(config.seed)
    base = context.base
    config = microbatch.settle(config, context)
    with Roles(base, config.memory.gradient_checkpointing) as roles:
        scorers = put_roles(config, context, roles)
        data = load(config, context, roles, scorers)
        heads = ILQLHeads(config.ilql.head, base.hidden_size, base.output_layer[0], config.seed)
        heads.to(base.device)
        steps = supervised.steps_of(config.train, len(data.rewards))
        parameters = [*roles.parameters("policy"), *heads.trainable()]
        optimizer = adamw(parameters, config.optim, config.strategy)
        scheduler = schedule(optimizer, config.optim, steps)
        parts = (
            {"policy": roles.parameters("policy"), "heads": list(heads.parameters())},
            optimizer,
            scheduler,
        )
        found, metrics = checkpoint.newest(context), {}
        if found.step:
            checkpoint.put_back(found.tree, *parts)
            metrics = found.tree["metrics"]
        with context.log("ilql", steps, SHOW, found) as log:
            with Keeper(
                context, steps, log, lambda: checkpoint.state_of(*parts) | {"metrics": metrics}
            ) as keeper:
                for step in range(found.step + 1, steps + 1):
                    rows = piece_of(len(data.rewards), config.train.batch_size, config.seed, step)
                    metrics = update(config, roles, heads, data.rows(rows), optimizer, parameters)
                    log.step(step, metrics | {"optim/lr": scheduler.get_last_lr()[0]})
                    scheduler.step()
                    keeper.after(step)
            with context.folder.publish(ADAPTER) as folder:
                roles.save("policy", folder)
            with context.folder.publish(ILQL) as folder:
                heads.save(folder / HEADS_FILE)
            found, samples = evaluate(config, roles, heads, scorers)
            log.samples(steps, samples)
    last = {name: metrics[name] for name in ("ilql/loss", "ilql/q_loss", "ilql/v_loss")}
    return found | last | data.metrics


def put_roles(config: ILQLRun | RFTRun, context: Context, roles: Roles) -> Heads:
    """The policy from the SFT adapter; the reward models that score, gold included, and their heads."""
    sft = context.adapter("sft")
    if sft is not None:
        roles.load("policy", sft, trainable=True)
    else:
        roles.new("policy", lora_config(config.lora, config.model), config.seed)
    gold = [GOLD] if config.reward_source.gold == LEARNED else []
    return load_reward_models([*proxies(config.reward_source), *gold], context, roles)


def load(config: ILQLRun, context: Context, roles: Roles, scorers: Heads) -> Data:
    """The training answers as token ids with their rewards.

    Raises InputError where all rewards are equal: there is nothing to tell good from bad by.
    """
    view = config.ilql.data
    rows, tokens = context.read(config.dataset, view, "train")
    responses = [ids for answers in tokens.answers.values() for ids in answers]
    prompts = tokens.prompts * len(tokens.answers)
    if view == "comparisons":
        scores = [1.0] * len(rows) + [-1.0] * len(rows)
    else:
        size = config.train.micro_batch_size
        scores = score(config.reward_source, roles, scorers, prompts, responses, size)
    rewards = torch.tensor(scores, dtype=torch.float64)
    mean, deviation = rewards.mean(), rewards.std(correction=0)
    if not deviation > 0:
        raise InputError(
            f"all {len(scores)} rewards are {scores[0]:g}, so there is nothing to learn from them: choose another "
            "reward_source, or more data"
        )
    metrics = {
        "data/answers": float(len(scores)),
        "data/reward": float(mean),
        "data/reward_std": float(deviation),
    }
    if config.ilql.normalise_rewards:
        rewards = (rewards - mean) / deviation
    return Data(
        written(prompts, responses, roles.base.eos_id),
        rewards.float().to(roles.base.device),
        metrics | statistics(config.dataset, view).metrics() | tokens.cuts.metrics(),
    )


def update(
    config: ILQLRun,
    roles: Roles,
    heads: ILQLHeads,
    data: Data,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
) -> dict[str, float]:
    """One optimiser step on `data`, then the copies follow; metrics are means over its tokens."""
    started = time.perf_counter()
    ilql, tokens = config.ilql, sum(map(len, data.rollout.responses))
    total: dict[str, Tensor] = {}
    groups = dealt(data.rollout, range(len(data.rewards)), config.train.micro_batch_size)
    for micro, counts in distributed.turns(groups, roles.base.in_shards):
        batch = answers(data.rollout, micro, roles.base)
        losses, shares = losses_of(config, roles, heads, batch, data.rewards, tokens)
        loss = losses.q + losses.v + ilql.cql_coef * losses.cql + ilql.awac_coef * losses.awac
        (loss if counts else 0 * loss).backward()
        if not counts:
            continue
        shares |= {f"{name}_loss": x.detach() for name, x in losses._asdict().items()}
        for name, share in (shares | {"loss": loss.detach()}).items():
            total[name] = total[name] + share if name in total else share
    distributed.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    algorithm.polyak_update(heads.target.parameters(), heads.q.parameters(), ilql.polyak)
    found = distributed.add({f"ilql/{name}": float(value) for name, value in total.items()})
    found["ilql/grad_norm"] = float(norm)
    if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(wrong)}: no finite number; lower optim.lr")
    found["time/step"] = time.perf_counter() - started
    return found | {"tokens_per_second": tokens / found["time/step"]}


def losses_of(
    config: ILQLRun, roles: Roles, heads: ILQLHeads, batch: Answers, rewards: Tensor, tokens: int
) -> tuple[Losses, dict[str, Tensor]]:
    """The four losses of a micro-batch, and figures; shares of means over `tokens` tokens."""
    ilql, mask = config.ilql, batch.mask
    hidden = hidden_before(roles, "policy", batch)
    values = padded(heads.values(hidden), mask)
    with torch.no_grad():
        lagging = [algorithm.taken_q(*head, batch.targets) for head in heads.targets(hidden)]
        q_target = padded(torch.minimum(*lagging), mask)
    terminal = algorithm.terminal_rewards(rewards[batch.rows], mask)
    goal = algorithm.bellman_targets(terminal, values, mask, ilql.gamma)
    taken = [twin(ilql.cql_coef, *head, batch.targets) for head in heads.twins(hidden)]
    weights = algorithm.awac_weights(q_target, values, ilql.awac_beta)
    (output, bias), layer = roles.base.output_layer, roles.base.output(hidden.dtype)
    logprobs = padded(linear_logprobs(hidden, output, bias, batch.targets, layer=layer).logprobs, mask)
    losses = Losses(
        q=sum(algorithm.bellman_loss(padded(found.q, mask), goal, mask, tokens) for found in taken),
        v=algorithm.expectile_loss(values, q_target, mask, ilql.tau, tokens),
        cql=sum(algorithm.token_loss(padded(found.nll, mask), mask, tokens) for found in taken),
        awac=algorithm.awac_loss(logprobs, weights, mask, tokens),
    )
    figures = {
        "q": taken[0].q,
        "v": values[mask],
        "advantage": (q_target - values)[mask],
        "weight": weights[mask],
    }
    return losses, {f"{name}_mean": x.detach().sum() / tokens for name, x in figures.items()}


def twin(
    cql_coef: float, features: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor
) -> algorithm.Taken:
    """Q of the taken tokens and the conservative term, which is left out (0) where its weight is 0."""
    if cql_coef > 0:
        return algorithm.taken_q_and_nll(features, weight, bias, actions)
    q = algorithm.taken_q(features, weight, bias, actions)
    return algorithm.Taken(q, torch.zeros_like(q))
