"""What has to hold before PPO trains, looked at on a few prompts, in seconds: `selfcheck: strict | warn | off`.

Nothing global is drawn and no weight, gradient or optimiser is touched: a run is bit for bit the same without it.
`check_start` in ppo.py asserts the same of the first iteration's whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
            padding(trial),
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
    worst = 0.0
    base = trial.actors.base
    for rows in trial.rows:
        batch = answers(trial.rollout, rows, base)
        with torch.enable_grad():
            hidden, _ = policy_and_value(trial.actors, batch)
            now = answer_logprobs(base, hidden, batch, trial.short.generation).logprobs.detach()
        ratio = (chosen(now, batch) - trial.seen.logprobs[batch.rows][batch.steps]).exp()
        worst = max(worst, float((ratio - 1).abs().max()))
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
def padding(trial: Trial) -> Check:
    """Rows scored alone and in a padded batch agree: padding is told by lengths, whatever its token."""
    everything = list(range(len(trial.rollout.prompts)))
    together = look(trial.short, trial.actors, trial.rollout, [[everything]])
    alone = look(trial.short, trial.actors, trial.rollout, [[[row] for row in everything]])
    difference = float((together.logprobs - alone.logprobs)[trial.mask].abs().mean())
    sequences = [[*p, *r] for p, r in zip(trial.rollout.prompts, trial.rollout.responses, strict=True)]
    for role, head in trial.actors.reward_heads.items():
        padded, single = (
            torch.tensor(score_sequences(trial.actors.roles, role, head, sequences, size))
            for size in (len(sequences), 1)
        )
        apart = (padded - single).abs() / padded.abs().clamp(min=1)
        difference = max(difference, float(apart.mean()))
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
    """EOS is one token, not forbidden everywhere, and the policy gives it some probability."""
    base, generation = trial.actors.base, trial.config.generation
    tokenizer, eos_id = base.tokenizer, base.eos_id
    weight, bias = base.output_layer
    limit = forbidden(generation, tokenizer, eos_id).get(eos_id, 0)
    one = tokenizer.convert_tokens_to_ids(tokenizer.eos_token) == eos_id and 0 <= eos_id < len(weight)
    probability = 0.0
    if one:
        batch = answers(trial.rollout, [0], base)
        hidden = hidden_before(trial.actors.roles, "policy", batch)
        logits = OutputLayer(weight, bias, hidden.dtype)(hidden)
        probability = float((logits / generation.temperature).softmax(dim=1)[:, eos_id].max())
    return Check(
        "eos",
        "EOS can be drawn",
        one and limit < generation.max_new_tokens and probability > 0,
        f"{tokenizer.eos_token!r} = {eos_id}, from token {limit + 1} of {generation.max_new_tokens} on, "
        f"probability up to {probability:.2g}",
        "no answer could end: model.eos_token, generation.min_new_tokens, generation.max_new_tokens",
    )


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
