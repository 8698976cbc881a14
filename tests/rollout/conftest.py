"""The tiny model with a random policy adapter on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rlhf_exp.model.base import Base, load_base
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.schema import Lora, Model

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="session")
def base() -> Base:
    return load_base(Model(name="tiny", source="builtin", dtype="float32", lora_targets=TARGETS), "cpu")


@pytest.fixture(scope="module")
def roles(base: Base) -> Iterator[Roles]:
    """Roles `policy` and `ref`, both unlike the base and each other."""
    with Roles(base) as roles:
        for number, name in enumerate(("policy", "ref")):
            roles.new(name, lora_config(Lora(r=4, targets=TARGETS), Model(name="tiny")), seed=number)
            generator = torch.Generator().manual_seed(number)
            for parameter in roles.parameters(name):
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        yield roles


@pytest.fixture
def prompts() -> list[list[int]]:
    """Eight prompts of different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, 512, (length,), generator=generator).tolist() for length in (3, 9, 1, 6, 6, 2, 12, 4)
    ]
