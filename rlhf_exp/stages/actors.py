"""Who takes part in PPO: policy, reference, reward model and critic, as roles on the one base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_exp.model.base import Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.rollout.scoring import Answers, hidden_before
from rlhf_exp.schema import PPORun
from rlhf_exp.stages.context import Context


@dataclass
class Actors:
    """The trained and the frozen parts, by role, on one base."""

    roles: Roles
    ref: str | None  # the role that is the reference; None where there was no SFT: the plain base
    critic: str  # the role whose hidden states the value head reads
    value_head: ScalarHead
    reward_head: ScalarHead | None

    @property
    def base(self) -> Base:
        return self.roles.base

    def trainable(self) -> list[torch.nn.Parameter]:
        roles = dict.fromkeys(("policy", self.critic))
        return [p for role in roles for p in self.roles.parameters(role)] + list(self.value_head.parameters())


def build_actors(config: PPORun, context: Context, roles: Roles) -> Actors:
    """Put the roles on the base: policy and reference from the SFT adapter, reward from the reward adapter."""
    sft = context.adapter("sft")
    if sft is not None:
        roles.load("policy", sft, trainable=True)
        roles.load("ref", sft)
    else:
        roles.new("policy", lora_config(config.lora, config.model), config.seed)
    reward_head = None
    if config.reward_source.kind == "learned":
        roles.load("reward", context.adapter("reward"))
        reward_head = ScalarHead.load(context.head("reward")).requires_grad_(False).to(roles.base.device)
    value_head = ScalarHead(roles.base.hidden_size)
    critic = "policy"
    if config.ppo.critic == "own":
        critic = "critic"
        if reward_head is not None:  # starts as the reward model (Stiennon et al. 2020, section 3.4)
            roles.load("critic", context.adapter("reward"), trainable=True)
            value_head.load_state_dict(reward_head.state_dict())
        else:
            roles.new("critic", lora_config(config.lora, config.model), config.seed + 1)
    value_head.to(roles.base.device)
    return Actors(roles, "ref" if sft is not None else BASE, critic, value_head, reward_head)


def policy_and_value(actors: Actors, batch: Answers) -> tuple[Tensor, Tensor]:
    """The policy's hidden states [N, d] and the critic's values [N] before each answer token."""
    hidden = hidden_before(actors.roles, "policy", batch)
    critic = hidden if actors.critic == "policy" else hidden_before(actors.roles, actors.critic, batch)
    return hidden, actors.value_head(critic)
