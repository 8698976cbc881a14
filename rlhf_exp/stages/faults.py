"""Known mistakes of other recipes, to see what each does: `ppo.faults=[wrong_reference, ...]`.

Every function stands at one place of the sound code and gives the sound thing, unless its fault is in the list.
Nothing else knows of faults.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.algorithms import masked
from rlhf_exp.algorithms.masked import last_token
from rlhf_exp.errors import InputError
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE
from rlhf_exp.schema import PPO, PPORun, learns

DROPOUT = 0.1  # of ref_with_dropout, the default of LoRA recipes
FILL = 1.0  # what padding holds in place of log-probs where entropy_over_padding was seen


@dataclass(frozen=True)
class Fault:
    """What breaks, where it was seen, and which checks of the start (selfcheck.py, `check_start`) it cannot pass."""

    breaks: str
    seen: str
    waives: tuple[str, ...] = ()


FAULTS = {
    "wrong_reference": Fault(
        "the reference is the plain base although there is an SFT adapter: the KL starts above 0 and pulls back to "
        "the base",
        "TRL 0.4 to 0.11 with PEFT",
        ("kl",),
    ),
    "ref_with_dropout": Fault(
        f"the reference computes with dropout {DROPOUT}: its log-probs are noise, the KL starts above 0",
        "reference models left in train mode",
        ("kl",),
    ),
    "whiten_per_minibatch": Fault(
        "advantages are whitened within each answer and sum to 0 there: no answer is better than another",
        "TRL before 0.5, minibatches of one answer",
    ),
    "whiten_over_padding": Fault(
        "mean and variance of the advantages count padding as zeros: they are neither centred nor of variance 1",
        "trlX",
    ),
    "entropy_over_padding": Fault(
        f"objective/entropy is a mean over padding too, each worth -{FILL:g}: it falls as lengths differ",
        "TRL's experimental PPO, summarize_from_feedback_details",
    ),
    "score_without_eos": Fault(
        "the reward model scores the answer's text encoded anew, without EOS: an input it was not trained on",
        "the baichuan LoRA recipe",
        ("reward_tokens",),
    ),
    "sigmoid_scores": Fault(
        "scores are squashed by a sigmoid: differences between good answers vanish",
        "the baichuan LoRA recipe",
    ),
    "random_reward_head": Fault(
        "the reward model's head is drawn anew: the scores mean nothing",
        "LoRA reward models saved without head",
        ("reward_head",),
    ),
    "missing_grad_clip": Fault("gradients are not clipped", "TRL's experimental PPO"),
    "reward_at_padded_end": Fault(
        "the score of all but the longest answers lands one place after the last token, on padding: it arrives "
        "discounted by gamma * lam",
        "trlX",
    ),
}


def require(names: Sequence[str], key: str = "ppo.faults", known: Mapping[str, Fault] = FAULTS) -> None:
    """InputError for a name that is no fault, with all that are. key: which config key holds the names."""
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(f"{key}: there is no fault {name}; {hint}there are {', '.join(known)}")
    if problems:
        raise InputError(problems)


def require_effect(config: PPORun, sft_adapter: bool) -> None:
    """InputError for a fault that would change nothing: what one sees of it would be no sign that it is harmless.

    sft_adapter: whether the reference is an adapter; else (no SFT, or SFT of all weights) it is the base itself.
    """
    idle = _idle(config, sft_adapter)
    problems = [
        f"ppo.faults: {name} changes nothing here: {idle[name]}; leave it out"
        for name in config.ppo.faults
        if name in idle
    ]
    if problems:
        raise InputError(problems)


def _idle(config: PPORun, sft_adapter: bool) -> dict[str, str]:
    """The faults without effect in this configuration, and why. What changes no more than the log has one."""
    ppo, found = config.ppo, {}
    if not sft_adapter:
        found["wrong_reference"] = "there is no SFT adapter, so that the base is the right reference"
    if not learns(config.reward_source):
        found |= dict.fromkeys(
            ("score_without_eos", "random_reward_head"),
            "it is of reward models, and the reward source has none",
        )
    whitening = ("whiten_per_minibatch", "whiten_over_padding")
    if ppo.estimator != "gae":
        of_gae = f"it is of ppo.estimator=gae, which is {ppo.estimator}"
        found |= dict.fromkeys((*whitening, "reward_at_padded_end"), of_gae)
    else:
        if not ppo.whiten_advantages:
            found |= dict.fromkeys(whitening, "ppo.whiten_advantages is false")
        elif set(whitening) <= set(ppo.faults):
            found[whitening[1]] = f"{whitening[0]} takes its place"
        if ppo.gamma * ppo.lam == 1:
            found["reward_at_padded_end"] = "it costs ppo.gamma * ppo.lam, which is 1"
    return found


def announce(ppo: PPO) -> None:
    """Say on the screen what is broken on purpose."""
    for name in ppo.faults:
        fault = FAULTS[name]
        waived = f"; not checked at the start: {', '.join(fault.waives)}" if fault.waives else ""
        print(f"fault {name}: {fault.breaks} (seen in {fault.seen}){waived}", flush=True)


def waived(ppo: PPO) -> set[str]:
    """The checks of the start that are left out."""
    return {check for name in ppo.faults for check in FAULTS[name].waives}


def reference(ppo: PPO, role: str | None) -> str | None:
    """The role that is the reference."""
    return BASE if "wrong_reference" in ppo.faults else role


def reward_head(ppo: PPO, head: ScalarHead | None, seed: int) -> ScalarHead | None:
    """The head that scores answers."""
    if head is None or "random_reward_head" not in ppo.faults:
        return head
    return ScalarHead(head.weight.numel()).reset(seed).requires_grad_(False).to(head.weight.device)


def ref_hidden(ppo: PPO, hidden: Tensor) -> Tensor:
    """The reference's hidden states."""
    return F.dropout(hidden, DROPOUT) if "ref_with_dropout" in ppo.faults else hidden


def scored_ids(ppo: PPO, tokenizer: Any, responses: list[list[int]]) -> list[list[int]]:
    """The ids of the answers as the reward model sees them."""
    if "score_without_eos" not in ppo.faults:
        return responses
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def scores(ppo: PPO, found: Tensor) -> Tensor:
    """The scores [B] as they come from the reward source."""
    return found.sigmoid() if "sigmoid_scores" in ppo.faults else found


def reward_place(
    ppo: PPO, rewards: Tensor, paid: Tensor, scores: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Rewards [B, T] and the mask of the places that are steps of an episode.

    paid [B, T]: the rewards before they were whitened, where they were; scores [B] are in them.
    """
    if "reward_at_padded_end" not in ppo.faults:
        return rewards, mask
    last = last_token(mask)
    after = (last + 1).clamp(max=mask.shape[1] - 1)
    rows = torch.arange(len(mask), device=mask.device)
    share = scores.to(rewards.dtype)
    if ppo.whiten_rewards:  # what is left of the score in the reward
        without, moments = paid.clone(), masked.Moments.of(paid, mask)
        without[rows, last] -= scores.to(paid.dtype)
        both = (masked.whiten(x, mask, moments, shift_mean=False)[rows, last] for x in (paid, without))
        share = torch.sub(*both).to(rewards.dtype)
    moved, steps = rewards.clone(), mask.clone()
    moved[rows, last] -= share
    moved[rows, after] += share
    steps[rows, after] = True
    return moved, steps


def whiten(ppo: PPO, advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B, T] with mean 0 and variance 1 over the whole batch."""
    if "whiten_per_minibatch" in ppo.faults:
        rows = zip(advantages.split(1), mask.split(1), strict=True)
        return torch.cat([masked.whiten(row, counts) for row, counts in rows])
    if "whiten_over_padding" in ppo.faults:
        everything = masked.Moments.of(advantages, torch.ones_like(mask))
        return masked.whiten(advantages, mask, everything)
    return masked.whiten(advantages, mask)


def mean_entropy(ppo: PPO, entropy: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """The policy's entropy, nats a token, for the log."""
    if "entropy_over_padding" in ppo.faults:
        return torch.where(mask, -logprobs, -FILL).mean()
    return masked.masked_mean(entropy, mask)


def max_grad_norm(ppo: PPO, norm: float) -> float:
    """The gradient norm that is clipped to."""
    return float("inf") if "missing_grad_clip" in ppo.faults else norm
