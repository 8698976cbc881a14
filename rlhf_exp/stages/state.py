"""What one PPO iteration leaves for the next, beside weights and optimiser: a checkpoint needs all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from rlhf_exp.algorithms.kl import next_kl_coef
from rlhf_exp.algorithms.masked import Moments
from rlhf_exp.schema import PPO


@dataclass
class State:
    """The KL controller and the running moments."""

    kl_coef: float
    scores: Moments  # of all scores so far
    returns: Moments  # of all answers' returns so far, the baseline of estimator=reinforce
    updates: int = 0  # optimiser steps, skipped ones included: it decides which demonstrations come next

    @classmethod
    def start(cls, ppo: PPO, device: torch.device | str = "cpu") -> State:
        nothing = Moments(*torch.zeros(3, dtype=torch.float64, device=device))
        return cls(ppo.kl_coef, nothing, nothing)

    def control(self, ppo: PPO, kl: float, episodes: int) -> None:
        """Set the coefficient of the next iteration from the KL of this one, nats an answer."""
        if ppo.kl_control == "adaptive":
            self.kl_coef = next_kl_coef(self.kl_coef, kl, ppo.kl_target, ppo.kl_horizon, episodes)

    def copy(self) -> State:
        """As it is now; the moments are never written to."""
        return replace(self)

    def forget(self, before: State) -> None:
        """What an unsound iteration told controller and moments is undone; its updates were done all the same."""
        self.kl_coef, self.scores, self.returns = before.kl_coef, before.scores, before.returns

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {
            "kl_coef": self.kl_coef,
            "scores": [float(x) for x in self.scores],
            "returns": [float(x) for x in self.returns],
            "updates": self.updates,
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], device: torch.device | str = "cpu") -> State:
        """What `to_dict` gave, bit for bit."""
        scores, returns = (
            Moments(*torch.tensor(found[name], dtype=torch.float64, device=device))
            for name in ("scores", "returns")
        )
        return cls(found["kl_coef"], scores, returns, found["updates"])
