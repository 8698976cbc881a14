"""rsLoRA and DoRA through Roles, against PEFT's own PeftModel on another base and the formulas of the papers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_exp.errors import InputError
from rlhf_exp.model import shapes
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.schema import Lora
from rlhf_exp.stages import adapters as given
from tests.model.conftest import LINEAR, tiny_model
from tests.model.test_roles import ROUNDING, gradients, hidden, separate

KINDS = {
    "rslora": Lora(r=4, alpha=8, rslora=True),
    "dora": Lora(r=4, alpha=8, dora=True),
    "both": Lora(r=4, alpha=8, rslora=True, dora=True, targets=["q_proj", "down_proj"]),
}
DORA = ("dora", "both")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """An adapter of each kind, saved; no weight is zero, and no magnitude the norm it started from."""
    root = tmp_path_factory.mktemp("kinds")
    with Roles(base) as roles:
        for number, (kind, lora) in enumerate(KINDS.items()):
            roles.new(kind, lora_config(lora, tiny_model()), seed=number)
            draw = torch.Generator().manual_seed(20 + number)
            for name, parameter in roles._tensors(kind).items():
                noise = torch.randn(parameter.shape, generator=draw)
                scale = parameter.data * (1 + 0.2 * noise)
                parameter.data = scale if name.endswith("magnitude_vector") else 0.2 * noise
            roles.save(kind, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_a_separately_loaded_model(base, folders, adapters, ids, kind):
    with Roles(base) as roles:
        roles.load("reward", adapters["b"])
        roles.load("policy", folders[kind])
        roles.load("ref", adapters["a"])
        ours = roles.trunk("policy", ids)
        assert (
            roles.trunk("reward", ids) - hidden(separate(base, adapters["b"]), ids)
        ).abs().max() < ROUNDING
        plain = roles.trunk(BASE, ids)
    assert (ours - hidden(separate(base, folders[kind]), ids)).abs().max() < ROUNDING
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_read(base, ids, tmp_path, kind):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32),
        lora_config(KINDS[kind], tiny_model()),
    ).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(tmp_path)
    given.check("sft", tmp_path, base.path, "any", "adapters.sft")
    with Roles(base) as roles:
        roles.load("policy", tmp_path)
        assert (roles.trunk("policy", ids) - hidden(model, ids)).abs().max() < ROUNDING
        roles.save("policy", tmp_path / "again")
    theirs, ours = (load_file(folder / given.WEIGHTS) for folder in (tmp_path, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_pefts_names_and_settings(base, folders, kind):
    config = json.loads((folders[kind] / given.CONFIG).read_text())
    assert (config["use_rslora"], config["use_dora"]) == (KINDS[kind].rslora, KINDS[kind].dora)
    stored = load_file(folders[kind] / given.WEIGHTS)
    ends = {name.partition(".lora_")[2] for name in stored}
    assert ends == {"A.weight", "B.weight"} | ({"magnitude_vector"} if kind in DORA else set())
    assert all(value.dtype == torch.float32 for value in stored.values())
    targets = LINEAR if KINDS[kind].targets == ["auto"] else KINDS[kind].targets
    size = shapes.lora_size(shapes.of_model(base.path), targets, 4, KINDS[kind].dora)
    assert size == sum(value.numel() for value in stored.values())


def test_size_by_hand(base):
    # q_proj [64, 64] and down_proj [64, 128] in two layers, r = 4: A and B, with DoRA 64 magnitudes each
    read, targets = shapes.of_model(base.path), ["q_proj", "down_proj"]
    assert shapes.lora_size(read, targets, 4) == 2 * 4 * ((64 + 64) + (64 + 128))
    assert shapes.lora_size(read, targets, 4, dora=True) == 2 * 4 * ((64 + 64) + (64 + 128)) + 2 * (64 + 64)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_a_joint_loss_are_those_of_separate_models(base, folders, adapters, ids, kind):
    """Policy of this kind and a critic of plain LoRA, a frozen reference between them, one backward."""
    with Roles(base) as roles:
        roles.load("policy", folders[kind], trainable=True)
        roles.load("critic", adapters["b"], trainable=True)
        roles.load("ref", folders[kind])
        policy = roles.trunk("policy", ids)
        roles.trunk("ref", ids)
        critic = roles.trunk("critic", ids)
        with roles.use("ref"):
            ((policy**3).sum() + (critic**4).sum()).backward()
        ours = {
            role: {n: p.grad.clone() for n, p in roles._tensors(role).items()}
            for role in ("policy", "critic")
        }
        assert all(p.grad is None for p in roles.parameters("ref"))
        assert all(p.grad is None for name, p in base.model.named_parameters() if "lora_" not in name)
    for role, folder, power in (("policy", folders[kind], 3), ("critic", adapters["b"], 4)):
        model = separate(base, folder)
        (hidden(model, ids) ** power).sum().backward()
        theirs = {
            n.removesuffix(".weight") if "magnitude" in n else n: g for n, g in gradients(model).items()
        }
        assert ours[role].keys() == theirs.keys()
        for key, gradient in theirs.items():
            assert gradient.abs().max() > 0, key
            assert (ours[role][key] - gradient).abs().max() < ROUNDING * gradient.abs().max(), (role, key)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_computes_as_the_base(base, bf16_base, ids, kind, precision):
    with Roles(base if precision == "float32" else bf16_base) as roles:
        roles.new("policy", lora_config(KINDS[kind], tiny_model()), seed=1)
        assert (roles.trunk("policy", ids) - roles.trunk(BASE, ids)).abs().max() == 0
        assert {p.dtype for p in roles.parameters("policy")} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_is_as_near_to_float32_as_peft_is(base, bf16_base, folders, ids, kind):
    with Roles(bf16_base) as roles:
        roles.load("policy", folders[kind], trainable=True)
        ours = roles.trunk("policy", ids)
        ours.float().square().sum().backward()
        assert {p.grad.dtype for p in roles.parameters("policy")} == {torch.float32}
        assert all(p.grad.abs().max() > 0 for p in roles.parameters("policy"))
    truth = hidden(separate(base, folders[kind]), ids)
    theirs = hidden(separate(bf16_base, folders[kind]), ids)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - truth).abs().mean() < 2.5 * (theirs.float() - truth).abs().mean()


def by_hand(base, folder, x: torch.Tensor, lora: Lora) -> torch.Tensor:
    """q_proj of the first layer: W0 x + s B A x, with DoRA m (W0 + s B A) x / |W0 + s B A| (row by row)."""
    name = "model.layers.0.self_attn.q_proj"
    stored = load_file(folder / given.WEIGHTS)
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    weight = base.model.get_submodule(name).weight
    scale = lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)
    changed = weight + scale * b @ a
    if lora.dora:
        magnitude = stored[f"base_model.model.{name}.lora_magnitude_vector"]
        changed = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    return x @ changed.T


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_follows_the_formula(base, folders, kind):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    expected = by_hand(base, folders[kind], x, KINDS[kind])
    with Roles(base) as roles:
        roles.load("policy", folders[kind])
        with roles.use("policy"):
            found = base.model.model.layers[0].self_attn.q_proj(x)
    assert (found - expected).abs().max() < 1e-4


def test_removing_a_dora_role_leaves_plain_layers(bf16_base, folders, adapters, ids):
    """Plain LoRA is multiplied in bfloat16 again, and a role of the same name is not DoRA any more."""
    with Roles(bf16_base) as roles:
        roles.load("ref", adapters["a"])
        before = roles.trunk("ref", ids)
        roles.load("policy", folders["dora"])
        roles.remove("policy")
        assert not any(layer.cast_input_dtype_enabled for layer in roles._layers)
        roles.load("policy", adapters["a"])
        assert (roles.trunk("policy", ids) - before).abs().max() == 0
        assert (roles.trunk("ref", ids) - before).abs().max() == 0


def test_an_incomplete_dora_adapter_is_refused(base, folders, tmp_path):
    stored = load_file(folders["dora"] / given.WEIGHTS)
    (tmp_path / given.CONFIG).write_bytes((folders["dora"] / given.CONFIG).read_bytes())
    first = next(name for name in sorted(stored) if name.endswith("magnitude_vector"))
    save_file({k: v for k, v in stored.items() if k != first}, tmp_path / given.WEIGHTS)
    with pytest.raises(InputError, match=r"no LoRA weights A and B and DoRA magnitudes of model\.layers\.0"):
        given.check("sft", tmp_path, base.path, base.hash, "adapters.sft")
    with Roles(base) as roles, pytest.raises(InputError, match=r"it has no .*magnitude_vector"):
        roles.load("policy", tmp_path)
    save_file(stored | {first: torch.zeros(7)}, tmp_path / given.WEIGHTS)
    with pytest.raises(InputError, match=r"magnitude_vector is \(7,\), the base's weight is"):
        given.check("sft", tmp_path, base.path, base.hash, "adapters.sft")
    # magnitudes that no config announces
    config = json.loads((tmp_path / given.CONFIG).read_text())
    (tmp_path / given.CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(InputError, match="only adapters of plain LoRA and of DoRA are supported"):
        given.check("sft", tmp_path, base.path, base.hash, "adapters.sft")


def test_peft_reads_an_adapter_of_gpt2_that_we_saved(tmp_path):
    """Conv1D stores [in, out]; the adapter is checked against the file's shapes, saved, and read back by PEFT."""
    from tests.model.architectures import conf, small_base

    base = small_base("gpt2", tmp_path / "base")
    base.model.save_pretrained(base.path)
    ids = torch.tensor([[5, 9, 30, 31]])
    with Roles(base) as roles:
        roles.new("policy", lora_config(Lora(r=3, dora=True), conf("gpt2")), seed=0)
        draw = torch.Generator().manual_seed(4)
        for parameter in roles.parameters("policy"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
        ours = roles.trunk("policy", ids)
        roles.save("policy", tmp_path / "adapter")
    given.check("sft", tmp_path / "adapter", base.path, base.hash, "adapters.sft")
    fresh = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "adapter"
    ).eval()
    theirs = fresh.base_model.model.transformer(input_ids=ids, use_cache=False).last_hidden_state
    assert (ours - theirs).abs().max() < ROUNDING
    stored = load_file(tmp_path / "adapter" / given.WEIGHTS)
    # c_fc goes from 32 to 128
    assert stored["base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"].shape == (3, 32)
    assert stored["base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"].shape == (128, 3)
    assert stored["base_model.model.transformer.h.0.mlp.c_fc.lora_magnitude_vector"].shape == (128,)
