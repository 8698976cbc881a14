"""What has to hold before PPO trains, looked at on a few prompts, in seconds: `selfcheck: strict | warn | off`.

Nothing global is drawn and no weight, gradient or optimiser is touched: a run is bit for bit the same without it.
`check_start` in ppo.py asserts the same of the first iteration's whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rlhf_exp.algorithms.logits import OutputLayer
from rlhf_exp.data.records import Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.rewards.learned import score_sequences
from rlhf_exp.rollout.engine import Rollout, generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.rollout.sampler import kept, processed, restricts
from rlhf_exp.rollout.scoring import Answers, answer_logprobs, answers, chosen, hidden_before
from rlhf_exp.rollout.texts import forbidden
from rlhf_exp.schema import Generation, PPORun
from rlhf_exp.stages import faults, provenance
from rlhf_exp.stages.actors import Actors, policy_and_value
from rlhf_exp.stages.context import Context
from rlhf_exp.stages.experience import Seen, look
from rlhf_exp.stages.provenance import Check

PROMPTS, TOKENS = 4, 16  # what is sampled for it: prompts, and tokens of an answer at most
# the most that log-probs of equal weights may differ before the first update: 0 in fp32 (same kernels, same
# shapes); in bf16 kernels may accumulate in another order with gradients on
TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.05}
# the mean difference of the sampler's log-probs (cached decoding) and the scoring forward's, whose kernels differ;
# also that of rows scored alone and in a padded batch
SAMPLER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
WIDTH = 5
# the sampler's processors, and where each changes nothing
IDLE = {
    "repetition_penalty": 1,
    "min_new_tokens": 0,
    "begin_suppress_tokens": [],
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
}


def run(
    config: PPORun,
    context: Context,
    actors: Actors,
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
) -> None:
    """Print the list. InputError with every failure for selfcheck=strict."""
    if config.selfcheck == "off":
        return
    devices = [actors.base.device] if actors.base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        found = list(checks(config, context, actors, prompts, encoded))
    waived = faults.waived(config.ppo)
    failed = [check for check in found if not (check.ok or check.note or check.name in waived)]
    for check in found:
        state = "ok" if check.ok else "note" if check.note else "FAIL" if check in failed else "(off)"
        line = f"{state:{WIDTH}} {check.title} ({check.detail})"
        print(line if check.ok else f"{line}: {check.cause}", flush=True)
    if failed and config.selfcheck == "strict":
        raise InputError(
            [f"self-check: not so: {c.title} ({c.detail}): {c.cause}" for c in failed]
            + ["selfcheck=warn trains all the same"]
        )


def checks(
    config: PPORun,
    context: Context,
    actors: Actors,
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
) -> Iterator[Check]:
    """All that apply to this run."""
    trial = Trial(config, actors, prompts, encoded)
    try:
        yield from (
            kl_is_zero(trial),
            ratio_is_one(trial),
            sampler_agrees(trial),
            *scoring(trial),
            eos_reachable(trial),
        )
    except FloatingPointError as error:
        cause = "the base's weights or the SFT adapter (adapters.sft), or model.dtype"
        yield Check("finite", "answers can be sampled", False, str(error), cause)
    yield from raw_logprobs(config.generation)
    if actors.reward_heads:
        yield provenance.reward_heads(context, actors)
        yield provenance.reward_tokens(config, context, actors, prompts, encoded)
    yield provenance.adapters(context, ("sft", *actors.reward_heads))
    yield provenance.overlap(config, context, prompts)
    yield provenance.memory_fits(config, context, actors)


@dataclass
class Trial:
    """A few prompts of different lengths, short answers to them, and what policy and reference say of these."""

    config: PPORun
    actors: Actors
    prompts: Sequence[Prompt]
    encoded: Sequence[Sequence[int]]

    @cached_property
    def rollout(self) -> Rollout:
        order = sorted(range(len(self.encoded)), key=lambda i: (len(self.encoded[i]), i))
        few = min(PROMPTS, len(order))
        picked = sorted({order[k * (len(order) - 1) // max(1, few - 1)] for k in range(few)})
        keys = [
            row_key(self.config.seed, 0, self.prompts[i].id, 0) for i in picked
        ]  # iterations count from 1
        roles = self.actors.roles
        return generate(
            self.actors.base,
            lambda: roles.use("policy"),
            [self.encoded[i] for i in picked],
            keys,
            self.short.generation,
        )

    @cached_property
    def short(self) -> PPORun:
        generation = self.config.generation
        return replace(
            self.config,
            generation=replace(generation, max_new_tokens=min(TOKENS, generation.max_new_tokens)),
        )

    @cached_property
    def rows(self) -> list[list[int]]:
        """The rows of each forward."""
        everything, size = list(range(len(self.rollout.prompts))), self.config.ppo.micro_batch_size
        return [everything[start : start + size] for start in range(0, len(everything), size)]

    @cached_property
    def seen(self) -> Seen:
        return look(self.short, self.actors, self.rollout, [self.rows])

    @cached_property
    def everything(self) -> Answers:
        return answers(self.rollout, range(len(self.rollout.prompts)), self.actors.base)

    @property
    def mask(self) -> Tensor:
        return self.everything.steps

    @property
    def size(self) -> str:
        return f"{len(self.rollout.prompts)} prompts, {int(self.mask.sum())} tokens"

    @property
    def allowed(self) -> float:
        return TOLERANCE[self.actors.base.dtype]

    @property
    def allowed_mean(self) -> float:
        return SAMPLER_TOLERANCE[self.actors.base.dtype]


@torch.no_grad()
def kl_is_zero(trial: Trial) -> Check:
    """Policy and reference are the same model."""
    worst = float((trial.seen.logprobs - trial.seen.ref_logprobs)[trial.mask].abs().max())
    if trial.actors.ahead:
        found = f"{trial.size}, largest difference {worst:.2g}"
        return Check(
            "kl", "the policy starts where the last round left it (prefer.start=last)", True, found, ""
        )
    return Check(
        "kl",
        "KL to the reference is 0",
        worst <= trial.allowed,
        f"{trial.size}, largest difference {worst:.2g}",
        "the reference is not what the policy starts from, or computes with dropout: adapters.sft, lora.dropout",
    )


def ratio_is_one(trial: Trial) -> Check:
    """The update's forward, with gradients on, gives the old log-probs."""
    differences = []
    base = trial.actors.base
    for rows in trial.rows:
        batch = answers(trial.rollout, rows, base)
        with torch.enable_grad():
            hidden, _ = policy_and_value(trial.actors, batch)
            now = answer_logprobs(base, hidden, batch, trial.short.generation).logprobs.detach()
        ratio = (chosen(now, batch) - trial.seen.logprobs[batch.rows][batch.steps]).exp()
        differences.append((ratio - 1).abs().max())
    worst = float(torch.stack(differences).max())  # nan where there is one, which Python's max would lose
    return Check(
        "ratio",
        "the ratio of new and old probabilities is 1",
        worst <= trial.allowed,
        f"largest difference {worst:.2g}",
        "scoring and updating forwards differ: dropout of the model, or kernels that depend on model.dtype",
    )


@torch.no_grad()
def sampler_agrees(trial: Trial) -> Check:
    """Cached decoding and the forward over whole answers give the same log-probs."""
    sampled = chosen(torch.cat(trial.rollout.logprobs).to(trial.mask.device), trial.everything)
    difference = (trial.seen.logprobs[trial.mask] - sampled).abs()
    raw = ", raw" if trial.config.generation.logprob_mode == "raw" else ""
    detail = f"mean {float(difference.mean()):.2g}, largest {float(difference.max()):.2g}{raw}"
    return Check(
        "sampler",
        "the sampler's log-probs are the scoring forward's",
        float(difference.mean()) <= trial.allowed_mean,
        detail,
        "left-padded cached decoding and the plain forward differ for this model: model, model.dtype",
    )


@torch.no_grad()
def scoring(trial: Trial) -> Iterator[Check]:
    """Reward models give numbers; rows scored alone and in a padded batch agree: padding is told by lengths."""
    sequences = [[*p, *r] for p, r in zip(trial.rollout.prompts, trial.rollout.responses, strict=True)]
    scores = {
        role: [
            torch.tensor(score_sequences(trial.actors.roles, role, head, sequences, size))
            for size in (len(sequences), 1)
        ]
        for role, head in trial.actors.reward_heads.items()
    }
    broken = [role for role, found in scores.items() if not bool(torch.stack(found).isfinite().all())]
    if broken:
        yield Check(
            "scores",
            "scores are finite",
            False,
            f"{len(sequences)} answers, nan or inf from {', '.join(broken)}",
            "the reward model's weights or what it computes in: adapters.reward, model.dtype",
        )
        return
    yield padding(trial, sequences, scores)


def padding(trial: Trial, sequences: Sequence[list[int]], scores: Mapping[str, Sequence[Tensor]]) -> Check:
    """Rows scored alone and in a padded batch agree, whatever the token that pads."""
    everything = list(range(len(trial.rollout.prompts)))
    together = look(trial.short, trial.actors, trial.rollout, [[everything]])
    alone = look(trial.short, trial.actors, trial.rollout, [[[row] for row in everything]])
    apart = [(together.logprobs - alone.logprobs)[trial.mask].abs().mean().cpu()]
    apart += [((padded - one).abs() / padded.abs().clamp(min=1)).mean() for padded, one in scores.values()]
    difference = float(torch.stack(apart).max())
    lengths = sorted(map(len, sequences))
    base = trial.actors.base
    same = ", which is EOS too" if base.pad_id == base.eos_id else ""
    return Check(
        "padding",
        "rows score the same alone and padded",
        difference <= trial.allowed_mean,
        f"{lengths[0]} to {lengths[-1]} tokens, PAD {base.pad_id}{same}, mean difference {difference:.2g}",
        "padding reaches real tokens: the model's attention is not causal, or its config sets a pad token (model)",
    )


@torch.no_grad()
def eos_reachable(trial: Trial) -> Check:
    """EOS is one token, not forbidden everywhere, and the policy gives it some probability.

    Where it is in no kept set of these few answers there is a note only: longer ones may end all the same.
    """
    base, generation = trial.actors.base, trial.config.generation
    tokenizer, eos_id = base.tokenizer, base.eos_id
    limit = forbidden(generation, tokenizer, eos_id).get(eos_id, 0)
    known = tokenizer.convert_tokens_to_ids(tokenizer.eos_token) == eos_id
    known = known and 0 <= eos_id < len(base.output_layer[0])
    probability, drawn = eos_probability(trial) if known else (0.0, 0.0)
    ok = known and limit < generation.max_new_tokens and probability > 0
    detail = f"{tokenizer.eos_token!r} = {eos_id}, from token {limit + 1} of {generation.max_new_tokens} on, "
    detail += f"probability up to {probability:.2g}"
    cause = "no answer could end: model.eos_token, generation.min_new_tokens, generation.max_new_tokens"
    note = False
    if ok and (restricts(generation) or generation.greedy):
        detail += f", kept by the sampler in {drawn:.0%} of {int(trial.mask.sum())} places"
        ok, note = drawn > 0, drawn == 0
        cause = "answers may not end by themselves: generation.top_k, top_p, min_p, greedy" if note else cause
    return Check("eos", "EOS can be drawn", ok, detail, cause, note=note)


def eos_probability(trial: Trial) -> tuple[float, float]:
    """EOS's largest probability before the kept sets, and the share of places whose kept set has it.

    Over all places of the trial's answers, as if EOS were not forbidden in the first ones.
    """
    base, generation, rollout = trial.actors.base, trial.config.generation, trial.rollout
    weight, bias = base.output_layer
    hidden = hidden_before(trial.actors.roles, "policy", trial.everything)
    every = OutputLayer(weight, bias, hidden.dtype)(hidden)  # a few dozen places
    written = [
        [*p, *r[:i]] for p, r in zip(rollout.prompts, rollout.responses, strict=True) for i in range(len(r))
    ]
    largest, kept_in = 0.0, 0
    for raw, so_far in zip(every.split(1), written, strict=True):
        seen = torch.tensor([so_far], device=raw.device) if generation.repetition_penalty != 1 else None
        logits = processed(raw, generation, 0, {}, seen)
        largest = max(largest, float(logits.softmax(dim=1)[0, base.eos_id]))
        if generation.greedy:
            kept_in += int(logits.argmax()) == base.eos_id
        elif restricts(generation):
            found = kept(logits, generation, logits.shape[1])
            kept_in += base.eos_id in found.ids[0, : int(found.counts)].tolist()
    return largest, kept_in / len(written)


def raw_logprobs(generation: Generation) -> Iterator[Check]:
    """Says so where ratios and KL are of another distribution than the answers. It was asked for: no failure."""
    on = [f"{name}={getattr(generation, name)}" for name in IDLE if getattr(generation, name) != IDLE[name]]
    if generation.logprob_mode == "raw" and on:
        yield Check(
            "raw",
            "log-probs are not of the distribution that answers are sampled from",
            False,
            ", ".join(on),
            "KL and ratios are biased by these, as generation.logprob_mode=raw asks; sampled replays them",
            note=True,
        )
