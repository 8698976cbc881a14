"""Who takes part in PPO: policy, reference, reward model and critic, as roles on the one base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_exp.model.base import Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.rollout.scoring import Answers, hidden_before
from rlhf_exp.schema import PPO, PPORun
from rlhf_exp.stages import faults
from rlhf_exp.stages.context import Context

EMA = "ema"  # the role, and the folder of its adapter


@dataclass
class Actors:
    """The trained and the frozen parts, by role, on one base."""

    roles: Roles
    ref: str | None  # the role that is the reference; None where there was no SFT: the plain base
    critic: str  # the role whose hidden states the value head reads
    value_head: ScalarHead | None  # None: there is no critic (estimators but gae)
    reward_head: ScalarHead | None
    detached: bool = False  # whether the value loss stops at the head
    ema: bool = False  # whether a role keeps an average of the policy

    @property
    def base(self) -> Base:
        return self.roles.base

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
    """Put the roles on the base: policy and reference from the SFT adapter, reward from the reward adapter."""
    ppo, sft = config.ppo, context.adapter("sft")
    for role, trainable in (("policy", True), (EMA, False)):
        if role == EMA and ppo.ema_decay == 0:
            continue
        if sft is not None:
            roles.load(role, sft, trainable=trainable)
        else:
            roles.new(role, lora_config(config.lora, config.model), config.seed, trainable=trainable)
    if sft is not None:
        roles.load("ref", sft)
    reward_head = None
    if config.reward_source.kind == "learned":
        roles.load("reward", context.adapter("reward"))
        reward_head = ScalarHead.load(context.head("reward")).requires_grad_(False).to(roles.base.device)
    ref = faults.reference(ppo, "ref" if sft is not None else BASE)
    critic, value_head = build_critic(config, context, roles, reward_head)
    return Actors(
        roles,
        ref,
        critic,
        value_head,
        faults.reward_head(ppo, reward_head, config.seed),
        detached=ppo.critic == "detached",
        ema=ppo.ema_decay > 0,
    )


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
        # starts as the reward model (Stiennon et al. 2020, section 3.4)
        if reward_head is not None and ppo.critic_init != "zero":
            roles.load(critic, context.adapter("reward"), trainable=True)
            value_head.load_state_dict(reward_head.state_dict())
        else:
            roles.new(critic, lora_config(config.lora, config.model), config.seed + 1)
    return critic, value_head.to(roles.base.device)


def policy_and_value(actors: Actors, batch: Answers, detached: bool = False) -> tuple[Tensor, Tensor | None]:
    """The policy's hidden states [N, d] and the critic's values [N] before each answer token.

    detached: the values give no gradient to the policy, whatever the critic; None: there is no critic.
    """
    hidden = hidden_before(actors.roles, "policy", batch)
    if actors.value_head is None:
        return hidden, None
    if actors.critic != "policy":
        return hidden, actors.value_head(hidden_before(actors.roles, actors.critic, batch))
    seen = hidden.detach() if detached or actors.detached else hidden
    return hidden, actors.value_head(seen)
