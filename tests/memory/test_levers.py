"""What each lever saves, by hand: the small Llama of test_parts.py (d 64, m 128, 2 layers, V 512), 4 rows of 10 + 6.

A token of a padded row (sft, float32, LoRA of rank 4 on q and v) keeps in a layer 2872 bytes: both norms' inputs and
sums 2 (4 * 64 + 4), q, k and v as wide as q each 3 * 4 * 64, the input of q and v and the attention's output 2 * 4 *
64, its sums 4 * 4, gate and up 2 * 4 * 128, x A^T of two matrices 2 * 4 * 4. Rows without a mask (ppo) have k and v
half as wide: 256 bytes less.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_exp.memory import architecture, counted, parts, strategies
from rlhf_exp.memory.counted import Facts
from rlhf_exp.memory.levers import levers
from rlhf_exp.model import shapes
from rlhf_exp.schema import PPO, Generation, PPORun, Reward, RewardRun, SFTRun
from tests.memory.test_parts import ADAPTER, LAYER, TARGETS, config_of

PADDED, PLAIN = 2872, 2616
ENDS = 2 * 4 * 64  # the last norm's input and the hidden states, a token
SFT_TOKENS = 4 * 16
TILE = 4 * 15 * 512 * 4 * 8.25 + 4 * 15 * 64 * 4  # of the 15 positions of each row that predict a token


@pytest.fixture(scope="module")
def model(tiny_path):
    return architecture.of_folder(tiny_path, shapes.of_model(tiny_path))


def savings(config, facts: Facts, allowed=lambda changed: True) -> dict[str, float]:
    def need(other) -> float:
        items = parts.items(other, facts)
        rank = strategies.on_rank(items, other.strategy.name, facts.ranks, facts.model, facts.dtype)
        return counted.peak(rank.device)[1]

    return {found.setting: found.saving for found in levers(config, need, allowed, facts.device, facts.ranks)}


@pytest.fixture
def facts(model, monkeypatch):
    # beside which nothing here is a thousandth
    monkeypatch.setattr(parts, "PROCESS", 0.0)
    monkeypatch.setattr(strategies, "DEEPSPEED", 0.0)
    monkeypatch.setattr(parts, "kernels", lambda config, facts: [])
    return Facts(model, "float32", "cpu", TARGETS)


def test_checkpointing_leaves_a_layers_input_and_one_layer(facts):
    """Of two layers one whole layer is saved, less each layer's input."""
    found = savings(config_of(SFTRun), facts)
    assert found["memory.gradient_checkpointing=true"] == SFT_TOKENS * (PADDED - 2 * 4 * 64)
    # a quarter of the rows: three quarters of what they keep and of the tile
    kept = SFT_TOKENS * (2 * PADDED + ENDS)
    assert found["train.micro_batch_size=1"] == 0.75 * (kept + TILE)
    assert set(found) == {"memory.gradient_checkpointing=true", "train.micro_batch_size=1"}


def test_moments_in_8_bits_and_a_base_in_4(facts):
    """6 bytes a trained number less, and of the layers' matrices 2 - 0.5 bytes and what their scales take.

    But the largest matrix comes back in bfloat16.
    """
    found = savings(config_of(SFTRun), replace(facts, dtype="bfloat16", device="cuda"))
    assert found["optim.moments=8bit"] == pytest.approx(ADAPTER * (8 - 2 - 2 * 4 / 256))
    assert found["model.quantization=4bit"] == pytest.approx(
        2 * LAYER * (2 - 0.5 - 1 / 64 - 4 / (64 * 256)) - 2 * 128 * 64
    )
    assert "optim.moments=8bit" not in savings(config_of(SFTRun), facts)


def test_a_limit_of_tokens_for_ppo(facts):
    """Two rows of 16 tokens in place of four: then the prompts of all 8 answers need most."""
    config = config_of(
        PPORun, ppo=PPO(batch_size=8, micro_batch_size=4), generation=Generation(max_new_tokens=6)
    )
    found = savings(config, facts)
    kept = 64 * (2 * PLAIN + ENDS)
    backward = kept + 4 * 6 * 64 * 4 + 64 * 4 * (4 * 128 + 2 * 64) + 4 * (ADAPTER + 65)
    prefill = 2 * 8 * 2 * (10 + 64) * 32 * 4 + 8 * 10 * 4 * (2 * 64 + 3 * 128)
    assert found["ppo.micro_batch_tokens=32"] == pytest.approx(backward - prefill)
    assert found["ppo.micro_batch_size=1"] == pytest.approx(backward - prefill)


def test_a_limit_of_tokens_for_pairs(facts):
    """Two pairs of 10 + 6 + 6 tokens in place of four save half of the activations and of their gradients."""
    config = config_of(RewardRun, reward=Reward())
    found = savings(config, facts)
    scores = 16 * 16 + 6 * 16  # of 16 tokens with themselves, of the rejected 6 with 10 and 6
    layer = 22 * (PLAIN - 4 * 4) + 4 * 4 * scores
    kept = 2 * layer + 22 * ENDS + 2 * 64 * 8
    backward = 22 * 4 * (4 * 128 + 2 * 64)
    assert found["reward.micro_batch_tokens=44"] == pytest.approx(2 * (kept + backward))
    assert found["train.micro_batch_size=1"] == pytest.approx(3 * (kept + backward))


def test_ranks_shard_the_moments(facts):
    """Of four ranks each keeps a quarter of Adam's moments: 8 * 3/4 bytes a number less.

    But DeepSpeed's flat copy of the weights and its shard are 4 * 5/4 bytes more.
    """
    config = config_of(SFTRun)
    found = savings(config, replace(facts, ranks=4))
    assert found["strategy=zero2"] == (6 - 5) * ADAPTER


def test_what_would_be_refused_is_no_lever(facts):
    found = savings(config_of(SFTRun), replace(facts, ranks=4), lambda other: other.strategy.name != "zero3")
    assert "strategy=zero2" in found
    assert "strategy=zero3" not in found


def test_chunks_of_logits(facts):
    """A vocabulary of 2^20: 4 rows of 6 answers would be 24 * 2^20 logits, of which a chunk has 2^22."""
    wide = replace(facts, model=replace(facts.model, vocabulary=2**20))
    config = config_of(
        PPORun, ppo=PPO(batch_size=8, micro_batch_size=4), generation=Generation(max_new_tokens=6)
    )
    (logits,) = (item for item in parts.items(config, wide) if item.whole)
    gradient = 24 * 64 * 4
    assert (logits.bytes, logits.whole) == (2**22 * 12 + gradient, 24 * 2**20 * 12 + gradient)
    (tile,) = (item for item in parts.items(config_of(SFTRun), wide) if item.whole)
    assert tile.bytes == 60 * 32768 * 33 + 60 * 64 * 4
    assert tile.whole == 60 * 2**20 * 12
