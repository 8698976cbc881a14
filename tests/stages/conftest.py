"""The tiny model, adapters and heads as files, and the configs and contexts that stages are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.model.base import Base, load_base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.rollout.engine import Rollout
from rlhf_exp.schema import (
    PPO,
    RUNS,
    Dataset,
    Generation,
    Lora,
    Model,
    Optim,
    PPORun,
    RewardSource,
    Tracking,
    Views,
)
from rlhf_exp.stages.actors import Actors
from rlhf_exp.stages.context import HEAD_FILE, Context
from rlhf_exp.store.runs import RunFolder
from rlhf_exp.tracking import NullTracker
from tests.stages.plain import make_rollout

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny(dtype: str = "float32") -> Model:
    return Model(name="tiny", source="builtin", dtype=dtype, lora_targets=LINEAR)


def reviews(**values: Any) -> Dataset:
    """The package's reviews, short."""
    return Dataset(
        **{
            "name": "reviews",
            "family": "reviews",
            "views": Views(*["builtin:reviews"] * 3),
            "max_prompt_tokens": 24,
            "max_response_tokens": 16,
            **values,
        }
    )


@pytest.fixture(scope="session")
def base() -> Base:
    return load_base(tiny(), "cpu")


@pytest.fixture(scope="session")
def bf16_base() -> Base:
    return load_base(tiny("bfloat16"), "cpu")


@pytest.fixture(scope="session")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders `sft`, `other`, `dropout` (half of the inputs, while training) and `reward` (with a head)."""
    root = tmp_path_factory.mktemp("adapters")
    with Roles(base) as roles:
        for number, name in enumerate(("sft", "other", "dropout", "reward")):
            lora = Lora(r=4, alpha=8.0, dropout=0.5 if name == "dropout" else 0.0)
            roles.new(name, lora_config(lora, tiny()), seed=number)
            generator = torch.Generator().manual_seed(number)
            for parameter in roles.parameters(name):
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            roles.save(name, root / name)
    head = ScalarHead(base.hidden_size).reset(3)
    head.bias.data.fill_(0.5)
    head.save(root / "reward" / HEAD_FILE)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def ppo_config() -> Callable[..., PPORun]:
    """PPORun on the tiny model; keywords of ppo, generation, optim and reward_source as dicts."""

    def make(
        ppo: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
        optim: dict[str, Any] | None = None,
        reward_source: dict[str, Any] | None = None,
        **values: Any,
    ) -> PPORun:
        return PPORun(
            stage="ppo",
            model=tiny(),
            lora=Lora(r=4, alpha=8.0),
            dataset=reviews(),
            tracking=Tracking(backend="none"),
            ppo=PPO(**{"steps": 1, "batch_size": 8, "epochs": 1, "micro_batch_size": 8, **(ppo or {})}),
            generation=Generation(**{"max_new_tokens": 6, **(generation or {})}),
            optim=Optim(**{"schedule": "constant", **(optim or {})}),
            reward_source=RewardSource(**(reward_source or {})),
            **values,
        )

    return make


@pytest.fixture
def run_config() -> Callable[..., Any]:
    """The root dataclass of another stage on the tiny model and the reviews."""

    def make(stage: str, dataset: dict[str, Any] | None = None, **values: Any) -> Any:
        common = {"lora": Lora(r=4, alpha=8.0), "model": tiny(), "tracking": Tracking(backend="none")}
        return RUNS[stage](stage=stage, dataset=reviews(**(dataset or {})), **{**common, **values})

    return make


@pytest.fixture
def context(base: Base, tmp_path: Path) -> Callable[..., Context]:
    """A Context with its run folder in the test's own folder; `parents`: stage -> folder."""

    def make(name: str = "run", on: Base = base, **parents: Path) -> Context:
        folder = RunFolder(tmp_path / name, "stage", "0" * 64)
        folder.start({})
        return Context(on, folder, NullTracker(), parents)

    return make


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[Base], dict[str, Any]]:
    """All that a stage could leave behind on the shared model."""

    def of(base: Base) -> dict[str, Any]:
        model = base.model
        return {
            "weights": {name: value.clone() for name, value in model.state_dict().items()},
            "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
            "own attributes": {
                name: sorted(set(vars(module)) - {"_modules", "_parameters", "_buffers"})
                for name, module in model.named_modules()
            },
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "training": [name for name, module in model.named_modules() if module.training],
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
            "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "tokenizer": (
                base.tokenizer.pad_token_id,
                base.tokenizer.padding_side,
                base.tokenizer.truncation_side,
                len(base.tokenizer),
            ),
        }

    return of


@pytest.fixture(scope="session")
def unchanged(fingerprint: Callable[[Base], dict[str, Any]]) -> Callable[[Base, dict[str, Any]], None]:
    """Asserts that the model is what it was at `fingerprint`, bit for bit."""

    def check(base: Base, before: dict[str, Any]) -> None:
        after = fingerprint(base)
        weights, expected = after.pop("weights"), dict(before)
        for name, value in expected.pop("weights").items():
            assert torch.equal(weights.pop(name), value), name
        assert not weights
        assert after == expected

    return check


@pytest.fixture
def replaced() -> Callable[..., Any]:
    """dataclasses.replace, a level down: replaced(config, "ppo", epochs=2)."""

    def make(config: Any, section: str, **values: Any) -> Any:
        return replace(config, **{section: replace(getattr(config, section), **values)})

    return make


@pytest.fixture
def rollout(base: Base) -> Rollout:
    """Eight answers by hand."""
    return make_rollout(base.eos_id)


@pytest.fixture
def actors(base: Base, adapters: dict[str, Path]) -> Iterator[dict[str, Actors]]:
    """Actors by their critic; policy away from ref, value heads not zero. `none`: without a critic."""
    with Roles(base) as roles:
        roles.load("policy", adapters["other"], trainable=True)
        roles.load("ref", adapters["sft"])
        roles.load("critic", adapters["reward"], trainable=True)
        trunk, own = (ScalarHead(base.hidden_size).reset(seed) for seed in (7, 8))
        yield {
            "trunk": Actors(roles, "ref", "policy", trunk, {}),
            "own": Actors(roles, "ref", "critic", own, {}),
            "detached": Actors(roles, "ref", "policy", trunk, {}, detached=True),
            "none": Actors(roles, "ref", "policy", None, {}),
        }
