"""Decoding with Q: what softmax(logits + beta * (Q - V)) answers for a list of betas, and how it scores."""

from __future__ import annotations

from dataclasses import replace

from rlhf_exp.data.encode import encode_prompts
from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Asked
from rlhf_exp.evaluation import interval
from rlhf_exp.model.ilql_heads import ILQLHeads
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.functions import NONE
from rlhf_exp.rewards.source import by_gold, score
from rlhf_exp.rollout.engine import Adjust, Rollout, judged
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import Generation, ILQLRun
from rlhf_exp.stages.actors import Heads
from rlhf_exp.stages.context import ROWS
from rlhf_exp.stages.evaluate import means_of, write
from rlhf_exp.stages.steering import steer

SAMPLES = 4  # answers a beta written to samples.jsonl


def prompts_of(config: ILQLRun) -> list[tuple[int, Asked]]:
    """Id and prompt of what is answered: validation prompts, each once; training ones with validation_share=0."""
    rows = load_view(config.dataset, config.ilql.data, "validation")
    rows = rows or load_view(config.dataset, config.ilql.data, "train")
    unique = {row.id: row.prompt for row in rows}
    return sorted(unique.items(), key=lambda item: item[0])[: config.ilql.eval_prompts or None]


def evaluate(
    config: ILQLRun, roles: Roles, heads: ILQLHeads, scorers: Heads
) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Mean reward of sampled and of greedy answers for every beta, with the same noise; and some samples.

    `eval/best_*` is the beta with the best sampled reward: chosen on these prompts, so a little flattered where they
    are few.
    """
    base, asked = roles.base, prompts_of(config)
    encoded = encode_prompts(base.tokenizer, config.dataset, [prompt for _, prompt in asked])
    number = config.ilql.eval_samples
    sampled = [(i, s) for i in range(len(asked)) for s in range(number)]
    metrics, samples, best = {"eval/prompts": float(len(asked))}, [], []
    for beta in config.ilql.betas:
        name = f"eval/beta_{beta:g}"
        keys = [row_key(config.seed, 0, asked[i][0], s) for i, s in sampled]
        drawn = decode(roles, steer(heads, beta), [encoded[i] for i, _ in sampled], keys, config.generation)
        scores = rewards_of(config, roles, scorers, drawn)
        # answers to one prompt are not independent: the error is that of the prompts' means
        means = means_of(scores, number)
        metrics[f"{name}/reward"], metrics[f"{name}/reward_se"] = interval.mean_se(means)
        if (spec := config.reward_source.gold) != NONE:
            texts = [str(asked[i][1]) for i, _ in sampled]
            gold = by_gold(spec, roles, scorers, drawn.prompts, judged(drawn), texts, ROWS)
            metrics[f"{name}/gold"], metrics[f"{name}/gold_se"] = interval.mean_se(means_of(gold, number))
        metrics[f"{name}/length"] = sum(map(len, drawn.responses)) / len(drawn.responses)
        metrics[f"{name}/eos_rate"] = sum(drawn.ended) / len(drawn.ended)
        best.append((metrics[f"{name}/reward"], beta))

        greedy = replace(config.generation, greedy=True)
        likely = decode(roles, steer(heads, beta), encoded, keys[::number], greedy)
        greedy_scores = rewards_of(config, roles, scorers, likely)
        metrics[f"{name}/greedy_reward"] = sum(greedy_scores) / len(greedy_scores)
        texts, plain = (
            base.tokenizer.batch_decode(x, skip_special_tokens=True)
            for x in (judged(drawn)[::number], judged(likely))
        )
        samples += [
            {"beta": beta, "prompt": str(asked[i][1]), "response": texts[i], "greedy": plain[i]}
            | {"score": scores[i * number], "greedy_score": greedy_scores[i]}
            for i in range(min(SAMPLES, len(asked)))
        ]
    metrics["eval/best_reward"], metrics["eval/best_beta"] = max(best, key=lambda item: item[0])
    return metrics, samples


def decode(
    roles: Roles,
    adjust: Adjust | None,
    prompts: list[list[int]],
    keys: list[int],
    generation: Generation,
) -> Rollout:
    """One answer of the policy to each prompt, ROWS at a time."""
    return write(roles, "policy", prompts, keys, generation, adjust)


def rewards_of(config: ILQLRun, roles: Roles, scorers: Heads, rollout: Rollout) -> list[float]:
    """The reward source's score of each answer, as it is, without normalisation."""
    return score(config.reward_source, roles, scorers, rollout.prompts, judged(rollout), ROWS)
