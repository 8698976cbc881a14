"""The code that oneDNN compiles: products of different shapes, by hand on the small Llama of test_parts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_exp.memory import architecture, counted, kernels, parts, sampling
from rlhf_exp.memory.counted import Facts
from rlhf_exp.model import shapes
from rlhf_exp.schema import PPO, Generation, PPORun, SFTRun, Train
from rlhf_exp.stages import context
from tests.memory.test_parts import TARGETS, config_of


@pytest.fixture
def facts(tiny_path, monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_float32", lambda: True)
    return Facts(architecture.of_folder(tiny_path, shapes.of_model(tiny_path)), "float32", "cpu", TARGETS)


def code(config, facts: Facts) -> float:
    found = parts.items(config, facts)
    return sum(i.bytes for i in found if i.kind == counted.LIBRARIES and i.label) / kernels.CODE


def test_of_float32_the_frozen_matrices_in_every_micro_batch(facts):
    """Of four shapes (q and o, k and v, gate and up, down) there and back; two micro-batches a step, three steps."""
    config = config_of(SFTRun, train=Train(steps=3, batch_size=8, micro_batch_size=4))
    assert code(config, facts) == pytest.approx(3 * 2 * (4 + 4))
    # of 10 + 6 tokens there are 16 lengths
    longer = config_of(SFTRun, train=Train(steps=300, batch_size=8, micro_batch_size=4))
    assert code(longer, facts) == pytest.approx(16 * 8)
    assert code(config, replace(facts, device="cuda")) == 0


def test_of_bfloat16_loras_products_and_attentions_too(facts):
    """LoRA on q [64, 64] and v [32, 64]: one A, two Bs; there 4 + 3, back 4 + 6; attention 2 and 5 of a block."""
    config = config_of(SFTRun, train=Train(steps=1, batch_size=4, micro_batch_size=4))
    assert code(config, replace(facts, dtype="bfloat16")) == pytest.approx(7 + 10 + 7)


def test_each_decoded_token_brings_two_shapes_in_bfloat16(facts):
    settings = PPO(steps=3, batch_size=8, micro_batch_size=8)
    config = config_of(PPORun, ppo=settings, generation=Generation(max_new_tokens=6))
    trained, sampled = 3 * (4 + 4), 3 * 2 * 4
    assert code(config, facts) == pytest.approx(trained + sampled)
    trained, sampled = 3 * (7 + 10 + 7), 3 * (2 * 7 + 2 * 6)
    assert code(config, replace(facts, dtype="bfloat16")) == pytest.approx(trained + sampled)


def test_no_more_than_the_cache_holds(facts):
    config = config_of(PPORun, ppo=PPO(steps=1000), generation=Generation(max_new_tokens=6))
    assert code(config, replace(facts, dtype="bfloat16")) == pytest.approx(1024)


@pytest.mark.parametrize(("maker", "found"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_makers(maker, found, monkeypatch):
    """The same as those of the product itself (tests/algorithms/test_product.py), where torch has both libraries."""
    monkeypatch.setattr(kernels, "vendor", lambda: maker)
    assert kernels.multiplies_float32() is found


def test_eval_generates_as_many_together_as_is_counted():
    assert sampling.EVAL_ROWS == context.ROWS
