"""The tiny model, loaded once per test session; two random adapters and heads as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_exp.model.base import Base, load_base
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.schema import Lora, Model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(dtype: str = "float32") -> Model:
    return Model(name="tiny", source="builtin", dtype=dtype, lora_targets=LINEAR)


@pytest.fixture(scope="session")
def base() -> Base:
    return load_base(tiny_model(), "cpu")


@pytest.fixture(scope="session")
def bf16_base() -> Base:
    return load_base(tiny_model("bfloat16"), "cpu")


@pytest.fixture(scope="session")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of adapters `a` (rank 4, all linear layers) and `b` (rank 8, two layers); no weight is zero."""
    root = tmp_path_factory.mktemp("adapters")
    shapes = {"a": Lora(r=4, alpha=8, targets=LINEAR), "b": Lora(r=8, alpha=4, targets=["q_proj", "v_proj"])}
    with Roles(base) as roles:
        for number, (name, lora) in enumerate(shapes.items()):
            roles.new(name, lora_config(lora, tiny_model()), seed=number)
            generator = torch.Generator().manual_seed(10 + number)
            for parameter in roles.parameters(name):
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            roles.save(name, root / name)
    return {name: root / name for name in shapes}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 512, (3, 11), generator=torch.Generator().manual_seed(0))
