"""Adapters on Baichuan: PEFT's own PeftModel and weights merged by hand are the oracles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rlhf_exp.algorithms.logprob import linear_logprobs
from rlhf_exp.model.base import Base, load_base
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.schema import Lora, Model
from tests.model.baichuan_folder import LAYERS, VOCABULARY, WIDTH, write_baichuan

KINDS = ["7b", "13b", "baichuan2-13b"]


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory) -> Base:
    folder = write_baichuan(tmp_path_factory.mktemp("roles") / request.param, request.param)
    return load_base(Model(name="baichuan", path=str(folder), dtype="float32"), "cpu")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))


def published_adapter(
    folder: Path, r: int = 4, alpha: int = 8, dropout: float = 0.0
) -> dict[str, torch.Tensor]:
    """An adapter in the files of PEFT 0.4 (2023), as published ones for `W_pack` are; returns its matrices."""
    generator = torch.Generator().manual_seed(5)
    folder.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.self_attn.W_pack"
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(r, WIDTH, generator=generator)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(3 * WIDTH, r, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "baichuan-inc/Baichuan-7B",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "revision": None,
        "target_modules": ["W_pack"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def separate(base: Base, folder: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=base.dtype)
    return PeftModel.from_pretrained(model, folder, is_trainable=True).eval()


def test_a_published_adapter_is_the_weights_with_its_product_added(base, ids, tmp_path):
    tensors = published_adapter(tmp_path / "adapter", dropout=0.05)
    with Roles(base) as roles:
        roles.load("policy", tmp_path / "adapter")
        ours = roles.trunk("policy", ids)
    plain = base.trunk(input_ids=ids).last_hidden_state
    merged = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        for layer in range(LAYERS):
            name = f"base_model.model.model.layers.{layer}.self_attn.W_pack"
            product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            merged.model.layers[layer].self_attn.W_pack.weight += 8 / 4 * product
    theirs = merged.model(input_ids=ids).last_hidden_state
    assert (ours - theirs).abs().max() < 2e-5
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_gradients_equal_those_of_a_peft_model(base, ids, tmp_path, checkpoint):
    published_adapter(tmp_path / "adapter")
    with Roles(base) as roles:
        roles.load("policy", tmp_path / "adapter", trainable=True)
        roles.load("ref", tmp_path / "adapter")
        if checkpoint:
            base.model.train()
            roles.checkpoint_activations()
        hidden = roles.trunk("policy", ids)
        weight, bias = base.output_layer
        rows, targets = hidden[:, :-1].reshape(-1, WIDTH), ids[:, 1:].reshape(-1)
        loss = -linear_logprobs(rows, weight, bias, targets, 1.0, None, None).logprobs.mean()
        with roles.use("ref"):
            loss.backward()
        ours = {name: p.grad.clone() for name, p in roles._tensors("policy").items()}
        base.model.eval()
    model = separate(base, tmp_path / "adapter")
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert set(ours) == set(theirs) and len(ours) == 2 * LAYERS
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-4, name
        assert (ours[name] - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max()), name


def test_a_fresh_adapter_computes_as_the_base_and_is_saved_for_peft(base, ids, tmp_path):
    lora = lora_config(Lora(r=2, alpha=4), Model(name="baichuan7b", lora_targets=["W_pack"]))
    plain = base.trunk(input_ids=ids).last_hidden_state
    with Roles(base) as roles:
        roles.new("policy", lora, seed=0)
        assert torch.equal(roles.trunk("policy", ids), plain)
        for parameter in roles.parameters("policy"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        ours = roles.trunk("policy", ids)
        roles.save("policy", tmp_path / "saved")
    theirs = separate(base, tmp_path / "saved").base_model.model.model(input_ids=ids).last_hidden_state
    assert (ours - theirs).abs().max() < 1e-5
    assert torch.equal(base.trunk(input_ids=ids).last_hidden_state, plain)


def test_all_linear_layers_can_be_targets(base, ids):
    targets = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with Roles(base) as roles:
        roles.new("policy", lora_config(Lora(r=2, targets=targets), Model(name="baichuan7b")), seed=0)
        assert len(roles.parameters("policy")) == 2 * len(targets) * LAYERS
        roles.trunk("policy", ids).square().sum().backward()
        gradients = [p.grad for name, p in roles._tensors("policy").items() if "lora_B" in name]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", ["7b", "baichuan2-13b"])
def test_bfloat16_trains_too(tmp_path, kind):
    """As stages run it: base in bfloat16, adapters in float32; over enough tokens for rounding to average out."""
    ids = torch.randint(3, VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(0))
    folder = write_baichuan(tmp_path / kind, kind)
    low = load_base(Model(name="baichuan", path=str(folder), dtype="bfloat16"), "cpu")
    exact = load_base(Model(name="baichuan", path=str(folder), dtype="float32"), "cpu")
    published_adapter(tmp_path / "adapter")
    gradients = []
    for base in (low, exact):
        with Roles(base) as roles:
            roles.load("policy", tmp_path / "adapter", trainable=True)
            roles.checkpoint_activations()
            base.model.train()
            roles.trunk("policy", ids).float().pow(3).mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in roles.parameters("policy")]))
            assert all(p.dtype == torch.float32 for p in roles.parameters("policy"))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
