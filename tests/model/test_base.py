"""Loading the base: the token that ends an answer, dropout, quantisation and what it takes."""

from __future__ import annotations

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

from rlhf_exp.errors import InputError
from rlhf_exp.model import base as base_model
from rlhf_exp.model import quantize
from rlhf_exp.model.base import load_base
from rlhf_exp.model.roles import BASE, Roles, lora_config
from rlhf_exp.schema import Lora, Model
from tests.model.architectures import small_base
from tests.model.conftest import LINEAR, tiny_model

BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def with_keys(**values) -> Model:
    return Model(name="tiny", source="builtin", dtype="float32", lora_targets=LINEAR, **values)


def test_another_token_ends_an_answer(tiny_path):
    plain, other = load_base(with_keys(), "cpu"), load_base(with_keys(eos_token="<|im_start|>"), "cpu")
    assert (plain.eos_id, plain.pad_id) == (2, 2)
    assert (other.eos_id, other.pad_id) == (1, 2)  # the pad token stays
    assert other.tokenizer.decode([1, 300], skip_special_tokens=True) == other.tokenizer.decode([300])
    # an ordinary token may end answers too
    word = plain.tokenizer.convert_ids_to_tokens(300)
    assert load_base(with_keys(eos_token=word), "cpu").eos_id == 300


@pytest.mark.parametrize("token", ["<|eot_id|>", "two words", ""])
def test_a_token_the_tokenizer_lacks_is_refused(token):
    with pytest.raises(
        InputError, match=r"model\.eos_token=.* is not one token of the tokenizer .*'<\|im_end\|>'"
    ):
        load_base(with_keys(eos_token=token), "cpu")


def test_the_models_own_dropout_is_off_in_training_too(tiny_path, tmp_path):
    """GPT-2 and OPT are published with dropout 0.1, and a Trainer puts the model into training mode."""
    base = small_base("gpt2")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(base.model.config, name, 0.5)
    base.model.save_pretrained(tmp_path)
    for file in tiny_path.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    loaded = load_base(Model(name="x", path=str(tmp_path), dtype="float32"), "cpu").model
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(loaded.train()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantisation_without_its_package_or_device_is_one_line(kind, monkeypatch):
    model = with_keys(quantization=kind)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf"model\.quantization={kind} needs the package bitsandbytes: pip install"
    ):
        load_base(model, "cpu")
    monkeypatch.setattr(quantize, "find_spec", lambda name: object())
    with pytest.raises(
        InputError, match=rf"model\.quantization={kind} needs a CUDA device, this run is on cpu"
    ):
        load_base(model, "cpu")
    quantize.require(model, "cuda")
    for trained in ((with_keys(quantization=kind, from_scratch=True), Lora()), (model, Lora(full=True))):
        with pytest.raises(InputError, match="quantised weights cannot be trained"):
            quantize.require(trained[0], "cuda", trained[1])
    quantize.require(with_keys(), "cpu", Lora(full=True))


def test_a_plan_is_refused_before_anything_is_read_or_fetched(monkeypatch):
    from rlhf_exp.stages import plan

    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    monkeypatch.setattr(base_model, "content_hash", lambda *a: pytest.fail("read"))
    config = SimpleNamespace(model=with_keys(quantization="4bit"), device="cpu", seed=0, dry_run=False)
    with pytest.raises(InputError, match="needs the package bitsandbytes"):
        plan.base_facts(config, download=False)


def test_settings_of_4_bit_are_those_of_qlora():
    found = quantize.config_of(with_keys(quantization="4bit"), torch.bfloat16)
    assert (found.load_in_4bit, found.load_in_8bit) == (True, False)
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    found = quantize.config_of(with_keys(quantization="8bit"), torch.bfloat16)
    assert (found.load_in_4bit, found.load_in_8bit) == (False, True)
    assert quantize.config_of(with_keys(), torch.bfloat16) is None


@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes is not installed: pip install 'rlhf-exp[quant]'")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_roles_on_a_quantised_base(kind, monkeypatch, ids):
    """On bitsandbytes' CPU kernels, which the product does not offer: too slow, but the same modules."""
    monkeypatch.setattr(quantize, "require", lambda *a: None)
    base = load_base(with_keys(quantization=kind), "cpu")
    modules = {name: type(module) for name, module in base.model.named_modules()}
    assert "bitsandbytes" in type(base.model.model.layers[0].mlp.up_proj).__module__
    assert type(base.model.lm_head) is torch.nn.Linear
    assert base.output_layer[0].dtype == torch.float32 and base.hidden_size == 64
    plain = base.trunk(input_ids=ids).last_hidden_state
    # PEFT moves 8-bit weights when DoRA reads them on a CPU, after which bitsandbytes cannot multiply them
    for lora in (Lora(r=4), Lora(r=4, dora=True))[: 2 if kind == "4bit" else 1]:
        with Roles(base) as roles:
            roles.new("policy", lora_config(lora, tiny_model()), seed=0)
            before = roles.trunk("policy", ids)
            assert (before - plain).abs().max() < (1e-5 if kind == "4bit" else 1e-2)
            before.square().sum().backward()
            with torch.no_grad():
                for parameter in roles.parameters("policy"):
                    assert parameter.dtype == torch.float32
                    parameter -= 0.1 * parameter.grad
            assert (roles.trunk("policy", ids) - plain).abs().max() > 0.01
            assert (roles.trunk(BASE, ids) - plain).abs().max() == 0
        assert {name: type(module) for name, module in base.model.named_modules()} == modules
        assert not base.model._hf_peft_config_loaded


def test_the_output_layer_is_converted_once_and_again_when_it_changed(tiny_path):
    base = load_base(Model(name="tiny", path=str(tiny_path), dtype="bfloat16"), "cpu")
    weight, _ = base.output_layer
    hidden = torch.randn(3, base.hidden_size).bfloat16()
    first = base.output(torch.bfloat16)
    assert base.output(torch.bfloat16) is first
    before = first(hidden)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(base.output(torch.bfloat16)(hidden), 2 * before)
    assert base.output(torch.float32) is not base.output(torch.bfloat16)
