"""The scalar head of the reward model and of the critic: one number from a hidden state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_exp.errors import InputError


class ScalarHead(nn.Module):
    """hidden [..., d] -> [...], in float32 whatever the base runs in.

    Reward heads start from N(0, 1 / (d + 1)) (Stiennon et al. 2020, appendix B.1, and Huang et al. 2024, detail
    "reward head initialisation"), value heads from 0, so that the first advantages are not noise of the head.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))

    def reset(self, seed: int) -> ScalarHead:
        """Draw the weight from N(0, 1 / (d + 1)) with a generator of its own; bias 0."""
        size = self.weight.numel()
        draw = torch.randn(size, generator=torch.Generator().manual_seed(seed)) / (size + 1) ** 0.5
        with torch.no_grad():
            self.weight.copy_(draw)
            self.bias.zero_()
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight + self.bias

    def save(self, path: Path) -> None:
        """Write weight and bias as safetensors."""
        from safetensors.torch import save_file

        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, path
        )

    @classmethod
    def load(cls, path: Path) -> ScalarHead:
        """Read what `save` wrote, bit for bit. Raises InputError if the file is not such a head."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
            head = cls(state["weight"].numel())
            head.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{path} is not a scalar head: {reason}") from error
        return head
