"""Who takes part in PPO: policy, reference, reward model and critic, as roles on the one base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.model.base import Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.rollout.scoring import Answers, hidden_before
from rlhf_exp.schema import GOLD, LEARNED, PPO, PPORun, proxies
from rlhf_exp.stages import faults
from rlhf_exp.stages.context import EMA, START, Context

Heads = dict[str, ScalarHead]  # of reward models, by role


@dataclass
class Actors:
    """The trained and the frozen parts, by role, on one base."""

    roles: Roles
    ref: str | None  # the role that is the reference; None where there was no SFT: the plain base
    critic: str  # the role whose hidden states the value head reads
    value_head: ScalarHead | None  # None: there is no critic (estimators but gae)
    reward_heads: Heads  # of the reward models and of the gold scorer, as far as they are learned
    detached: bool = False  # whether the value loss stops at the head
    ema: bool = False  # whether a role keeps an average of the policy
    ahead: bool = False  # whether the policy starts past the reference: where another run left it

    @property
    def base(self) -> Base:
        return self.roles.base

    @property
    def reward_head(self) -> ScalarHead | None:
        """Of the (first) reward model."""
        return self.reward_heads.get("reward")

    def critic_parameters(self) -> list[torch.nn.Parameter]:
        """The value head, and the critic's adapter where it has its own."""
        own = self.roles.parameters(self.critic) if self.critic != "policy" else []
        return own + (list(self.value_head.parameters()) if self.value_head is not None else [])

    def trainable(self) -> list[torch.nn.Parameter]:
        return self.roles.parameters("policy") + self.critic_parameters()

    def groups(self, ppo: PPO) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser: the policy, then the critic, which may have its own learning rate."""
        own = {} if ppo.critic_lr is None else {"lr": ppo.critic_lr}
        found = [
            {"params": self.roles.parameters("policy")},
            {"params": self.critic_parameters()} | own,
        ]
        return [group for group in found if group["params"]]

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """ema = decay * ema + (1 - decay) * policy, of LoRA's A and B each (Ouyang et al. 2022, appendix C.4)."""
        if self.ema:
            for mean, now in zip(self.roles.parameters(EMA), self.roles.parameters("policy"), strict=True):
                mean.lerp_(now, 1 - decay)


def build_actors(config: PPORun, context: Context, roles: Roles) -> Actors:
    """Put the roles on the base: policy and reference from the SFT adapter, reward from the reward adapters.

    In a later round with prefer.start=last the policy starts from the last round's.
    """
    ppo, sft = config.ppo, context.adapter("sft")
    start = context.adapter(START) or sft
    for role, trainable in (("policy", True), (EMA, False)):
        if role == EMA and ppo.ema_decay == 0:
            continue
        if start is not None:
            roles.load(role, start, trainable=trainable)
        else:
            roles.new(role, lora_config(config.lora, config.model), config.seed, trainable=trainable)
    if sft is not None:
        roles.load("ref", sft)
    models = proxies(config.reward_source)
    heads = load_reward_models(models, context, roles)
    gold = [GOLD] if config.reward_source.gold == LEARNED else []
    ref = faults.reference(ppo, "ref" if sft is not None else BASE)
    critic, value_head = build_critic(config, context, roles, heads.get("reward"))
    return Actors(
        roles,
        ref,
        critic,
        value_head,
        {role: faults.reward_head(ppo, head, config.seed) for role, head in heads.items()}
        | load_reward_models(gold, context, roles),
        detached=ppo.critic == "detached",
        ema=ppo.ema_decay > 0,
        ahead=start is not sft,
    )


def load_reward_models(names: Iterable[str], context: Context, roles: Roles) -> Heads:
    """Put reward adapters on the base, frozen, each as the role of its name in the plan; and their heads."""
    heads = {}
    for name in names:
        roles.load(name, context.adapter(name))
        heads[name] = ScalarHead.load(context.head(name)).requires_grad_(False).to(roles.base.device)
    return heads


def build_critic(
    config: PPORun, context: Context, roles: Roles, reward_head: ScalarHead | None
) -> tuple[str, ScalarHead | None]:
    """The critic's role and its head; no head where the estimator has no critic."""
    ppo = config.ppo
    if ppo.estimator != "gae":
        return "policy", None
    value_head, critic = ScalarHead(roles.base.hidden_size), "policy"
    if ppo.critic == "own":
        critic = "critic"
        # starts as the (first) reward model (Stiennon et al. 2020, section 3.4); a sum is on another scale
        starts = ppo.critic_init == "reward" or (
            ppo.critic_init == "auto" and config.reward_source.kind == LEARNED
        )
        if reward_head is not None and starts:
            roles.load(critic, context.adapter("reward"), trainable=True)
            value_head.load_state_dict(reward_head.state_dict())
        else:
            roles.new(critic, lora_config(config.lora, config.model), config.seed + 1)
    return critic, value_head.to(roles.base.device)


def policy_and_value(actors: Actors, batch: Answers, detached: bool = False) -> tuple[Tensor, Tensor | None]:
    """The policy's hidden states [N, d] and the critic's values [N] before each answer token.

    detached: the values give no gradient to the policy, whatever the critic; None: there is no critic.
    """
    hidden, read = states(actors, batch)
    return hidden, values(actors, read, detached)


def states(actors: Actors, batch: Answers) -> tuple[Tensor, Tensor | None]:
    """Hidden states [N, d] before each answer token: the policy's, and those that the value head reads."""
    hidden = hidden_before(actors.roles, "policy", batch)
    if actors.value_head is None:
        return hidden, None
    return hidden, hidden if actors.critic == "policy" else hidden_before(actors.roles, actors.critic, batch)


def values(actors: Actors, read: Tensor | None, detached: bool = False) -> Tensor | None:
    """The critic's values [N] of the states [N, d] that it reads; see `policy_and_value`."""
    if read is None:
        return None
    alone = actors.critic == "policy" and (detached or actors.detached)
    return actors.value_head(read.detach() if alone else read)
