"""Policies on held-out prompts (candidates.py: which), paired by prompt and by noise.

Writes eval.json, report.html and PNGs into its run folder. Every answer is scored by what the policy was trained on
(reward) and by a scorer it never saw (gold); the KL is that of the untruncated distributions at temperature 1. With
several answers a prompt, standard errors and intervals are of the prompts' means, since answers to one prompt are
not independent. With eval.greedy each policy also gives its most probable answers, which are only scored. The data's
own answers to the prompts are scored beside them (data_answers.py): what was imitated. A judge may say whose answers
are better than those of one of the policies (compared.py), and an encoder how near they are to prompt and reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_exp.data.encode import encode_prompts, encode_responses
from rlhf_exp.data.records import Prompt
from rlhf_exp.evaluation import interval, rouge, text
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.rewards import functions, relevance
from rlhf_exp.rewards.source import by_gold, score
from rlhf_exp.rollout.engine import Adjust, Rollout, generate, judged, spoken
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import GOLD, LEARNED, EvalRun, Generation, proxies
from rlhf_exp.stages import steering
from rlhf_exp.stages.actors import Heads, load_reward_models
from rlhf_exp.stages.candidates import SFT, Candidate, candidates, reference_of
from rlhf_exp.stages.compared import Comparer, own_scores, said
from rlhf_exp.stages.context import ROWS, Context
from rlhf_exp.stages.data_answers import answers_to, prompts_of
from rlhf_exp.stages.divergence import best_of_n_to_sft, kl_to_sft
from rlhf_exp.stages.drawing import Drawn, Rounds, best
from rlhf_exp.stages.evaluate_report import figures, publish, sample_rows
from rlhf_exp.stages.written import written

SHOW = (
    ("reward", "reward", ".2f"),
    ("gold", "gold", ".2f"),
    ("kl", "KL", ".2f"),
    ("length", "length", ".1f"),
)


@dataclass
class Measured:
    """One policy's answers and figures; `samples_per_prompt` answers of a prompt stand together."""

    candidate: Candidate
    rollout: Rollout
    texts: list[str]
    scores: dict[str, list[float]]  # "reward", "gold", "judge": one an answer
    means: dict[str, list[float]]  # the same, one a prompt
    greedy: list[str]  # texts, one a prompt; none unless asked for
    metrics: dict[str, float] = field(default_factory=dict)


def run(config: EvalRun, context: Context) -> dict[str, float]:
    """Evaluate every candidate; write eval.json and the report."""
    prompts = prompts_of(config)
    encoded = encode_prompts(context.base.tokenizer, config.dataset, [prompt.prompt for prompt in prompts])
    everyone = candidates(config, context)
    reference = reference_of(config.eval, everyone)
    measured: dict[int, Measured] = {}
    rounds = Rounds()
    with Roles(context.base) as roles, context.log("eval", len(everyone), SHOW) as log:
        heads = load_scorer(config, context, roles)
        data = measure_data(config, roles, heads, prompts, encoded)
        comparer = Comparer(config, roles)
        # first the one that the others are compared with
        for number, place in enumerate(sorted(range(len(everyone)), key=lambda i: (i != reference, i)), 1):
            now = measure(config, context, roles, heads, everyone[place], prompts, encoded, rounds)
            if measured:
                asked = repeat(prompts, config.eval.samples_per_prompt)
                now.metrics |= comparer.metrics(now, measured[reference], asked)
            measured[place] = now
            # a policy that is off the path of training, as best of n, was here at no step
            step = {"policy_step": float(now.candidate.step)} if now.candidate.on_path else {}
            log.step(number, now.metrics | step)
            log.samples(number, sample_rows(now, prompts, answer))
    found = [measured[place] for place in range(len(everyone))]
    evaluation = content(config, found, prompts)
    if config.eval.judge != functions.NONE:
        evaluation["judge"] = {"by": said(config), "against": found[reference].candidate.name}
    evaluation |= {"data": data} if data else {}
    publish(config, context, evaluation, len(prompts))
    return figures(config, found, data)


def content(config: EvalRun, found: list[Measured], prompts: list[Prompt]) -> dict[str, Any]:
    """Policies and samples of eval.json (evaluation/outcome.py); gains are over the SFT model, else the first."""
    start = next((m for m in found if m.candidate.name == SFT), found[0])
    return {
        "prompts": len(prompts),
        "evaluate_on": config.dataset.evaluate_on,
        "policies": [
            {
                "name": m.candidate.name,
                "step": m.candidate.step if m.candidate.on_path else None,
                "metrics": m.metrics,
                "gain": interval.gains(start.means, m.means, seed=config.seed),
            }
            | how(m.candidate)
            for m in found
        ],
        "samples": [
            {"prompt": str(prompts[i].prompt), "responses": {m.candidate.name: answer(m, i) for m in found}}
            for i in range(min(config.eval.samples, len(prompts)))
        ],
    }


def how(candidate: Candidate) -> dict[str, Any]:
    """What eval.json says of a policy besides its name and figures, as far as there is something to say."""
    found: dict[str, Any] = {"run": candidate.run, "role": candidate.role, "beta": candidate.beta}
    if candidate.best_of > 1:
        found |= {"best_of": candidate.best_of, "bounds": ["kl"]}
    return {name: value for name, value in found.items() if value not in (None, "")}


def load_scorer(config: EvalRun, context: Context, roles: Roles) -> Heads:
    """The reward models that score, gold included, as roles; and their heads."""
    gold = [GOLD] if config.eval.gold == LEARNED else []
    return load_reward_models([*proxies(config.reward_source), *gold], context, roles)


def measure(
    config: EvalRun,
    context: Context,
    roles: Roles,
    heads: Heads,
    candidate: Candidate,
    prompts: list[Prompt],
    encoded: list[list[int]],
    rounds: Rounds | None = None,
) -> Measured:
    """Answers of one policy to all prompts (the same noise for every policy), and its figures.

    rounds: answers that other policies of this evaluation have drawn already, where it is the best of n.
    """
    role, adjust = BASE, None
    if candidate.adapter is not None:
        role = "candidate"
        roles.load(role, candidate.adapter)
    if candidate.heads is not None:
        adjust = steering.of_run(candidate.heads, candidate.beta, context.base)
    count = config.eval.samples_per_prompt

    def draw(j: int) -> Drawn:
        keys = [row_key(config.seed, 0, p.id, s + count * j) for p in prompts for s in range(count)]
        found = write(roles, role, repeat(encoded, count), keys, config.generation, adjust)
        rewards = score(config.reward_source, roles, heads, found.prompts, judged(found), ROWS)
        return Drawn(found, rewards, sum(map(len, found.responses)))

    policy = (candidate.adapter, candidate.beta or 0.0)
    drawn = best((Rounds() if rounds is None else rounds).of(policy, candidate.best_of, draw))
    rollout = drawn.rollout
    texts, scores = scored(config, roles, heads, repeat(prompts, count), rollout, drawn.rewards)
    means = {name: means_of(values, count) for name, values in scores.items()}
    metrics: dict[str, float] = {}
    for name, values in means.items():
        metrics[name], metrics[f"{name}_se"] = interval.mean_se(values)
    greedy: list[str] = []
    if config.eval.greedy and candidate.best_of == 1:  # n most probable answers are equal
        one = replace(config.generation, greedy=True)
        likely = write(roles, role, encoded, [0] * len(encoded), one, adjust)
        greedy, greedy_scores = scored(config, roles, heads, prompts, likely)
        metrics |= {f"greedy_{name}": interval.mean_se(values).mean for name, values in greedy_scores.items()}
    metrics["kl"] = distance(context, roles, role, candidate, rollout, adjust)
    metrics["sampled_tokens"] = drawn.tokens / len(texts)
    metrics |= text.measure(texts, spoken(rollout), rollout.ended)
    references = [prompt.reference for prompt in prompts]
    metrics |= rouge.measure(texts, repeat(references, count))
    metrics |= relevant(config, roles, repeat(prompts, count), texts)
    if greedy:  # as published figures are made
        found = rouge.measure(greedy, references)
        metrics |= {f"greedy_{name}": value for name, value in found.items()}
    if candidate.adapter is not None:
        roles.remove(role)
    return Measured(candidate, rollout, texts, scores, means, greedy, metrics)


def distance(
    context: Context, roles: Roles, role: str | None, candidate: Candidate, rollout: Rollout, adjust: Any
) -> float:
    """KL to SFT in nats an answer (divergence.py); of a best-of-n what it is at most."""
    if candidate.best_of > 1:
        given = (context, roles, role, rollout, adjust)
        return best_of_n_to_sft(candidate.best_of, *given, of_sft=candidate.of_sft)
    return 0.0 if candidate.kind == SFT else kl_to_sft(context, roles, role, rollout, adjust)


def measure_data(
    config: EvalRun, roles: Roles, heads: Heads, prompts: list[Prompt], encoded: list[list[int]]
) -> dict[str, Any] | None:
    """The figures of the data's own answers, EOS and template as in training; None where there is not one.

    Means are over the answers, so that a prompt counts as often as the data have it; errors know that those to one
    prompt are not independent. A text has no policy: there is no KL.
    """
    found = answers_to(prompts, config)
    if found is None:
        return None
    asked = [encoded[i] for i in found.places]
    responses = encode_responses(roles.base.tokenizer, config.dataset, found.texts)
    rollout = written(asked, responses, roles.base.eos_id)
    texts, scores = scored(config, roles, heads, [prompts[i] for i in found.places], rollout)
    metrics = {"answers": float(len(texts)), "prompts": float(len(set(found.places)))}
    for name, values in scores.items():
        metrics[name], metrics[f"{name}_se"] = interval.grouped_mean_se(values, found.places)
    metrics |= text.measure(texts, spoken(rollout), rollout.ended)
    metrics |= relevant(config, roles, [replace(prompts[i], reference=None) for i in found.places], texts)
    return {"name": "data", "kind": found.kind, "metrics": metrics}


def relevant(config: EvalRun, roles: Roles, prompts: list[Prompt], texts: list[str]) -> dict[str, float]:
    """How near the answers are to prompts and references, by eval.encoder; nothing without one."""
    if config.eval.encoder is None:
        return {}
    folder = relevance.find(config.eval.encoder, download=True)
    asked, references = [str(prompt.prompt) for prompt in prompts], [prompt.reference for prompt in prompts]
    return relevance.measure(str(folder), asked, references, texts, str(roles.base.device))


def repeat(rows: Sequence[Any], count: int) -> list[Any]:
    """Each row `count` times, one after the other."""
    return [row for row in rows for _ in range(count)]


def means_of(values: Sequence[float], count: int) -> list[float]:
    """The mean of each `count` values in a row."""
    return [sum(values[i : i + count]) / count for i in range(0, len(values), count)]


def write(
    roles: Roles,
    role: str | None,
    encoded: list[list[int]],
    keys: list[int],
    generation: Generation,
    adjust: Adjust | None = None,
) -> Rollout:
    """One answer to each row, ROWS at a time."""
    parts = [slice(i, i + ROWS) for i in range(0, len(encoded), ROWS)]
    return join(
        generate(roles.base, lambda: roles.use(role), encoded[part], keys[part], generation, adjust)
        for part in parts
    )


def scored(
    config: EvalRun,
    roles: Roles,
    heads: Heads,
    prompts: list[Prompt],
    rollout: Rollout,
    rewards: list[float] | None = None,
) -> tuple[list[str], dict[str, list[float]]]:
    """The answers' texts, and their reward (unless it is known) and gold score."""
    shown = judged(rollout)
    texts = roles.base.tokenizer.batch_decode(shown, skip_special_tokens=True)
    if rewards is None:
        rewards = score(config.reward_source, roles, heads, rollout.prompts, shown, ROWS)
    scores = {"reward": rewards}
    if config.eval.gold != functions.NONE:
        asked = [str(prompt.prompt) for prompt in prompts]
        scores["gold"] = by_gold(config.eval.gold, roles, heads, rollout.prompts, shown, asked, ROWS)
    scores |= own_scores(config, roles, heads, prompts, rollout, shown, ROWS)
    return texts, scores


def join(parts: Any) -> Rollout:
    """Rollouts one after the other."""
    columns = zip(*parts, strict=True)
    return Rollout(
        *(None if column[0] is None else [row for part in column for row in part] for column in columns)
    )


def answer(measured: Measured, i: int) -> dict[str, Any]:
    """The first answer to prompt `i`, with its own scores."""
    row = i * (len(measured.texts) // len(measured.means["reward"]))
    found = {"text": measured.texts[row], "ended": measured.rollout.ended[row]}
    found |= {name: values[row] for name, values in measured.scores.items()}
    return found | ({"greedy": measured.greedy[i]} if measured.greedy else {})
