"""The heads of ILQL on the policy's hidden states: twin Q, their lagging copies, and V.

What they cost, in float32 at 16 bytes a trained number (weight, gradient, Adam's two moments) and 4 for a lagging
copy, so 2 * (16 + 4) = 40 bytes a number of one Q head:

    head     numbers of one Q head     d = 576, V = 49k     d = 4096, V = 64k (7B)
    mlp      2 d^2 + 2 d V             2.3 GB               22 GB
    linear   d V                       1.1 GB               10 GB
    tied     4 d^2                     53 MB                2.7 GB

`tied` maps the hidden state to another one, which the model's own frozen output layer projects to the vocabulary:
tokens that mean the same to the model then have similar Q. Heads give what a projection to the vocabulary takes and
leave the product to rlhf_exp.algorithms.ilql, which never holds Q of all tokens at all positions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_exp.errors import InputError

KINDS = ("mlp", "linear", "tied")


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), as nn.Linear has it."""
    return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5)


class Perceptron(nn.Module):
    """[N, d] -> relu(x W^T + b) [N, 2 d], in float32."""

    def __init__(self, size: int, generator: torch.Generator):
        super().__init__()
        self.weight = _uniform((2 * size, size), size, generator)
        self.bias = nn.Parameter(torch.zeros(2 * size))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight, self.bias).relu()


class Projection(NamedTuple):
    """Q(s, .) = features @ weight.T + bias, not multiplied out."""

    features: Tensor  # float32[N, k]
    weight: Tensor  # [V, k]
    bias: Tensor | None  # float32[V]


class QHead(nn.Module):
    """hidden [N, d] -> the projection to Q of all tokens."""

    def __init__(self, kind: str, size: int, vocabulary: int, generator: torch.Generator):
        super().__init__()
        self.inner = None if kind == "linear" else Perceptron(size, generator)
        width = size if kind == "linear" else 2 * size
        self.weight = _uniform((size if kind == "tied" else vocabulary, width), width, generator)
        self.bias = None if kind == "tied" else nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Tensor, output: Tensor) -> Projection:
        features = hidden.float() if self.inner is None else self.inner(hidden)
        if self.bias is None:
            return Projection(nn.functional.linear(features, self.weight), output, None)
        return Projection(features, self.weight, self.bias)


class ILQLHeads(nn.Module):
    """hidden [N, d] of real positions -> projections to Q of the twins and of their lagging copies, and V [N].

    `output`: weight [V, d] of the model's output layer, on which `tied` heads stand; it is neither trained, copied
    nor saved. Call it outside of autocast: all is float32.
    """

    def __init__(self, kind: str, size: int, output: Tensor, seed: int = 0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"the kind of a head must be one of {', '.join(KINDS)}, got {kind}")
        generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        self._output = [output.detach()]  # in a list: no parameter of ours
        self.q = nn.ModuleList(QHead(kind, size, output.shape[0], generator) for _ in range(2))
        self.target = copy.deepcopy(self.q).requires_grad_(False)
        self.v_inner = None if kind == "linear" else Perceptron(size, generator)
        width = size if kind == "linear" else 2 * size
        self.v_weight = _uniform((width,), width, generator)
        self.v_bias = nn.Parameter(torch.zeros(()))

    def trainable(self) -> list[nn.Parameter]:
        """The twins and V, not the lagging copies."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def twins(self, hidden: Tensor) -> list[Projection]:
        return [head(hidden, self._output[0]) for head in self.q]

    def targets(self, hidden: Tensor) -> list[Projection]:
        return [head(hidden, self._output[0]) for head in self.target]

    def values(self, hidden: Tensor) -> Tensor:
        """V(s) [N]."""
        inner = hidden.float() if self.v_inner is None else self.v_inner(hidden)
        return inner @ self.v_weight + self.v_bias

    def save(self, path: Path) -> None:
        """Write everything but the model's output layer as safetensors."""
        from safetensors.torch import save_file

        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, metadata={"kind": self.kind})

    @classmethod
    def load(cls, path: Path, size: int, output: Tensor) -> ILQLHeads:
        """Read what `save` wrote, bit for bit. InputError if the file is no such heads, or another model's."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                kind = (file.metadata() or {}).get("kind", "none")
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            heads = cls(kind, size, output)
            heads.load_state_dict(state)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path} does not hold ILQL heads for this model: {reason[:200]}") from error
        return heads.to(output.device)
