"""Roles on one base against separately loaded PEFT models: the oracle is PEFT's own PeftModel on a fresh base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_exp.errors import InputError
from rlhf_exp.model.base import Base
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.schema import Lora
from tests.model.conftest import LINEAR, tiny_model

# of numbers near 1 in float32: layers and norms here are one operation where PEFT and transformers take several
ROUNDING = 3e-5


def separate(base: Base, folder: Path, trainable: bool = True) -> PeftModel:
    """Another model in memory, read by PEFT from the same files."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=base.dtype)
    return PeftModel.from_pretrained(model, folder, is_trainable=trainable).eval()


def hidden(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """Under the names of the file format, as Roles keeps them."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("name", ["a", "b"])
def test_forward_equals_a_separately_loaded_model(base, adapters, ids, name):
    with Roles(base) as roles:
        roles.load("policy", adapters["a"])
        roles.load("reward", adapters["b"])
        role = {"a": "policy", "b": "reward"}[name]
        ours = roles.trunk(role, ids)
    theirs = hidden(separate(base, adapters[name]), ids)
    assert (ours - theirs).abs().max() < ROUNDING
    assert (
        ours - base.trunk(input_ids=ids).last_hidden_state
    ).abs().max() > 0.1  # the adapter does something


def test_logprobs_of_both_roles_equal_those_of_separate_models(base, adapters, ids):
    with Roles(base) as roles:
        roles.load("policy", adapters["a"])
        roles.load("ref", adapters["b"])
        weight, _ = base.output_layer
        ours = [(roles.trunk(role, ids) @ weight.T).log_softmax(-1) for role in ("policy", "ref", "policy")]
    theirs = [separate(base, adapters[name])(input_ids=ids).logits.log_softmax(-1) for name in "ab"]
    assert (ours[0] - theirs[0]).abs().max() < ROUNDING
    assert (ours[1] - theirs[1]).abs().max() < ROUNDING
    assert (ours[2] - ours[0]).abs().max() == 0


def joint_gradients(base: Base, adapters: dict[str, Path], ids: torch.Tensor, checkpoint: bool) -> dict:
    """Policy and critic forwards interleaved with frozen ones, one joint loss, one backward."""
    with Roles(base) as roles:
        roles.load("policy", adapters["a"], trainable=True)
        roles.load("critic", adapters["b"], trainable=True)
        roles.load("ref", adapters["a"])
        if checkpoint:
            base.model.train()
            roles.checkpoint_activations()
        policy = roles.trunk("policy", ids)
        reference = roles.trunk("ref", ids)
        critic = roles.trunk("critic", ids)
        with roles.use("ref"):  # whatever is active during the backward must not matter
            ((policy**3).sum() + (critic**4).sum() + 0 * reference.sum()).backward()
        found = {
            role: {name: p.grad.clone() for name, p in roles._tensors(role).items()}
            for role in ("policy", "critic")
        }
        assert all(p.grad is None for p in roles.parameters("ref"))
        assert all(p.grad is None for name, p in base.model.named_parameters() if "lora_" not in name)
        base.model.eval()
    return found


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_joint_loss_gives_each_adapter_the_gradient_of_a_separate_model(base, adapters, ids, checkpoint):
    ours = joint_gradients(base, adapters, ids, checkpoint)
    for role, name, power in (("policy", "a", 3), ("critic", "b", 4)):
        model = separate(base, adapters[name])
        (hidden(model, ids) ** power).sum().backward()
        theirs = gradients(model)
        assert set(ours[role]) == set(theirs)
        for key, gradient in theirs.items():
            assert gradient.abs().max() > 0, key
            assert (ours[role][key] - gradient).abs().max() < ROUNDING * gradient.abs().max(), (role, key)


def test_switching_between_forward_and_backward_loses_no_gradient(base, adapters, ids):
    """The trap: PEFT's set_adapter here would leave the policy without a gradient, and raise nothing."""
    with Roles(base) as roles:
        roles.load("policy", adapters["a"], trainable=True)
        roles.load("ref", adapters["b"])
        loss = roles.trunk("policy", ids).square().sum()
        roles.trunk("ref", ids)
        assert all(p.requires_grad for p in roles.parameters("policy"))
        assert not any(p.requires_grad for p in roles.parameters("ref"))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.parameters("policy"))


def test_foreign_checkpointing_is_refused(base, adapters, ids):
    with Roles(base) as roles:
        roles.load("policy", adapters["a"], trainable=True)
        base.model.activation_checkpointing_enable()
        try:
            with pytest.raises(RuntimeError, match="checkpoint_activations"):
                roles.trunk("policy", ids)
        finally:
            base.model.activation_checkpointing_disable()


def test_loading_another_adapter_changes_nothing_of_the_first(base, adapters, ids):
    with Roles(base) as roles:
        roles.load("policy", adapters["a"], trainable=True)
        before = roles.trunk("policy", ids)
        roles.load("ref", adapters["b"])
        assert all(p.requires_grad for p in roles.parameters("policy"))
        assert (roles.trunk("policy", ids) - before).abs().max() == 0
        roles.remove("ref")
        assert (roles.trunk("policy", ids) - before).abs().max() == 0
        with pytest.raises(KeyError, match="ref"), roles.use("ref"):
            pass


def test_use_restores_the_role_also_after_an_exception(base, adapters):
    with Roles(base) as roles:
        roles.load("a", adapters["a"])
        roles.load("b", adapters["b"])
        with roles.use("a"):
            with pytest.raises(ZeroDivisionError), roles.use("b"):
                assert roles.active == "b"
                _ = 1 / 0
            assert roles.active == "a"
            assert {layer.active_adapters[0] for layer in roles._layers} == {"a"}
        assert roles.active is BASE


def test_close_gives_the_plain_base_back(base, adapters, ids):
    modules = {name: type(module) for name, module in base.model.named_modules()}
    plain = base.trunk(input_ids=ids).last_hidden_state
    with Roles(base) as roles:
        roles.load("policy", adapters["a"])
        assert (roles.trunk(BASE, ids) - plain).abs().max() == 0
    assert {name: type(module) for name, module in base.model.named_modules()} == modules
    assert (base.trunk(input_ids=ids).last_hidden_state - plain).abs().max() == 0
    with Roles(base) as roles:  # and it can be used again
        roles.load("policy", adapters["b"])


def test_a_new_adapter_computes_as_the_base_and_comes_from_its_seed(base, ids):
    config = lora_config(Lora(r=4), tiny_model())
    drawn = []
    for seed in (1, 1, 2):
        state = torch.get_rng_state()
        with Roles(base) as roles:
            roles.new("policy", config, seed)
            assert (roles.trunk("policy", ids) - roles.trunk(BASE, ids)).abs().max() == 0
            drawn.append([p.detach().clone() for p in roles.parameters("policy")])
        assert torch.equal(torch.get_rng_state(), state)  # the caller's generator has not moved
    assert all(torch.equal(x, y) for x, y in zip(drawn[0], drawn[1], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(drawn[0], drawn[2], strict=True))


def test_adapters_stay_float32_on_a_bfloat16_base(base, bf16_base, adapters, ids):
    with Roles(bf16_base) as roles:
        roles.load("policy", adapters["a"], trainable=True)
        out = roles.trunk("policy", ids)
        assert out.dtype == torch.bfloat16
        assert {p.dtype for p in roles.parameters("policy")} == {torch.float32}
        out.float().square().sum().backward()
        assert {p.grad.dtype for p in roles.parameters("policy")} == {torch.float32}
    # PEFT multiplies the adapter in float32, we in bfloat16. Both are as far from the float32 model as bfloat16 is;
    # this adapter is larger than the weights it adds to, so it shows more here than in use
    truth = hidden(separate(base, adapters["a"]), ids)
    ours, theirs = (
        (x.float() - truth).abs().mean() for x in (out, hidden(separate(bf16_base, adapters["a"]), ids))
    )
    assert ours < 2.5 * theirs
    assert theirs < 0.1  # values are of order 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_optimiser_step_counts_while_the_role_is_in_use(base, bf16_base, adapters, ids, dtype):
    """Autocast caches the weights it has cast: a Trainer that runs inside one `use` would train on stale ones."""
    with Roles(base if dtype == "float32" else bf16_base) as roles:
        roles.load("policy", adapters["a"], trainable=True)
        with roles.use("policy"):
            before = roles.trunk("policy", ids)
            with torch.no_grad():
                for parameter in roles.parameters("policy"):
                    parameter.mul_(0.5)
            after = roles.trunk("policy", ids)
        assert (after - roles.trunk("policy", ids)).abs().max() == 0
        assert (after - before).abs().max() > 0.1


def test_saved_adapter_is_bit_for_bit_and_in_peft_format(base, adapters, tmp_path):
    with Roles(base) as roles:
        roles.load("policy", adapters["a"])
        roles.save("policy", tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    first, second = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (adapters["a"], tmp_path / "copy")
    )
    assert first == second


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_no_trace(base, adapters, tmp_path, ids):
    from safetensors.torch import load_file, save_file

    plain = base.trunk(input_ids=ids).last_hidden_state
    file = tmp_path / "adapter_model.safetensors"
    for name in ("adapter_config.json", "base.json"):
        (tmp_path / name).write_bytes((adapters["a"] / name).read_bytes())
    stored = load_file(adapters["a"] / file.name)
    first = sorted(stored)[0]

    save_file({k: v for k, v in stored.items() if k != first}, file)
    with Roles(base) as roles:
        with pytest.raises(InputError, match=r"it has no .*lora_A"):
            roles.load("policy", tmp_path)
        save_file(stored | {first: torch.zeros(4, 63)}, file)
        with pytest.raises(InputError, match=r"\(4, 63\), needed is \(4, 128\)|\(4, 63\), needed is"):
            roles.load("policy", tmp_path)
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(InputError, match="not a LoRA adapter"):
            roles.load("policy", tmp_path)
    assert (base.trunk(input_ids=ids).last_hidden_state - plain).abs().max() == 0


def test_targets_must_exist(base):
    with pytest.raises(InputError, match=r"lora\.targets=\[auto\]"):
        lora_config(Lora(), tiny_model().__class__(name="x"))
    with Roles(base) as roles, pytest.raises(InputError, match=r"lora\.targets"):
        roles.new("policy", lora_config(Lora(targets=["W_pack"]), tiny_model()), 0)


def test_all_linear_layers_are_wrapped(base):
    with Roles(base) as roles:
        roles.new("policy", lora_config(Lora(r=2), tiny_model()), 0)
        # 2 layers x 7 matrices x (A, B)
        assert len(roles.parameters("policy")) == 2 * len(LINEAR) * 2
