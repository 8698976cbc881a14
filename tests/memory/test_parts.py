"""What a stage holds, by hand on a small Llama: d 64, m 128, two layers, 4 heads of 16 on 2 key heads, V 512."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_exp.memory import (
    activations,
    architecture,
    counted,
    parts,
    sampling,
    strategies,
    table,
    training,
    travel,
    weights,
)
from rlhf_exp.memory.counted import Batch, Facts, Item
from rlhf_exp.model import shapes
from rlhf_exp.schema import (
    DPO,
    ILQL,
    PPO,
    DPORun,
    Generation,
    ILQLRun,
    Lora,
    Memory,
    Model,
    Optim,
    PPORun,
    Reward,
    RewardRun,
    SFTRun,
    Strategy,
    Train,
)

TARGETS = ("q_proj", "v_proj")
LAYER = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
NUMBERS = 2 * LAYER + 512 * 64 + 5 * 64
ADAPTER = 2 * 4 * ((64 + 64) + (64 + 32))  # two layers, r = 4: A and B of q and of v


@pytest.fixture(scope="module")
def model(tiny_path):
    return architecture.of_folder(tiny_path, shapes.of_model(tiny_path))


@pytest.fixture
def facts(model):
    return Facts(model, "float32", "cpu", TARGETS)


def config_of(kind: type, **more: Any) -> Any:
    dataset = SimpleNamespace(max_prompt_tokens=10, max_response_tokens=6)
    more = {"train": Train(batch_size=8, micro_batch_size=4)} | more if kind is not PPORun else more
    found = kind(stage="x", lora=Lora(r=4), memory=Memory(), optim=Optim(), **more)
    found.dataset = dataset
    return found


def of(items: list[Item], kind: str, role: str | None = None, phase: str | None = None) -> float:
    return sum(
        item.bytes
        for item in items
        if item.kind == kind and role in (None, item.role) and (phase is None or item.there(phase))
    )


def test_an_adapter_is_sixteen_bytes_a_number_beside_one_base(facts):
    found = parts.items(config_of(SFTRun), facts)
    assert of(found, counted.PARAMETERS, "base") == 4 * NUMBERS
    assert of(found, counted.PARAMETERS, "policy") == 4 * ADAPTER
    assert of(found, counted.GRADIENTS) == 4 * ADAPTER
    assert of(found, counted.OPTIMISER) == 8 * ADAPTER


def test_a_process_takes_memory_of_its_own_where_it_is_the_devices(facts):
    found = [item for item in parts.items(config_of(SFTRun), facts) if item.kind == counted.LIBRARIES]
    assert [item.bytes for item in found if not item.label] == [
        counted.PROCESS
    ]  # test_kernels.py has the others
    assert of(parts.items(config_of(SFTRun), replace(facts, device="cuda")), counted.LIBRARIES) == 0


def test_a_step_on_cuda_holds_roots_of_the_second_moments(facts):
    """torch._foreach_sqrt of all second moments at once: 4 bytes a trained number, when activations are gone."""
    found = parts.items(config_of(SFTRun), replace(facts, device="cuda"))
    assert of(found, counted.OPTIMISER, phase=counted.STEP) == (8 + 4) * ADAPTER
    assert of(found, counted.OPTIMISER, phase=counted.BACKWARD) == 8 * ADAPTER
    assert of(found, counted.KEPT, phase=counted.STEP) == 0
    assert of(found, counted.GRADIENTS, phase=counted.STEP) == 4 * ADAPTER
    assert of(parts.items(config_of(SFTRun), facts), counted.OPTIMISER, phase=counted.STEP) == 8 * ADAPTER


def test_a_second_model_is_held_beside_the_base(facts):
    beside = (counted.Beside("judge", 1000.0, 70.0), counted.Beside("encoder", 300.0, 20.0))
    found = parts.items(ppo(), replace(facts, beside=beside))
    assert of(found, counted.PARAMETERS, "judge") == 1000
    assert of(found, counted.PASSING, "judge", counted.SECOND) == 70
    assert of(found, counted.PASSING, "encoder", counted.FORWARD) == 0
    assert of(found, counted.PARAMETERS, "encoder", counted.DECODE) == 300


def test_eight_bit_moments_are_a_byte_each_and_a_float_for_256(facts):
    config = config_of(SFTRun)
    config.optim.moments = "8bit"
    assert of(parts.items(config, facts), counted.OPTIMISER) == pytest.approx(ADAPTER * 2 * (1 + 4 / 256))


@pytest.mark.parametrize(
    ("kind", "each"), [("none", 2), ("4bit", 0.5 + 1 / 64 + 4 / (64 * 256)), ("8bit", 1)]
)
def test_a_quantised_base_keeps_its_table_and_its_vectors(model, kind, each):
    kept = 512 * 64 + 5 * 64
    assert weights.base_bytes(model, "bfloat16", kind) == pytest.approx(2 * kept + each * 2 * LAYER)


def test_of_a_quantised_base_a_matrix_is_put_back_at_a_time(facts):
    """The widest has 128 x 64 numbers; the table of 512 x 64 is not quantised."""
    config = config_of(SFTRun)
    config.model = Model(name="x", quantization="4bit")
    found = parts.items(config, replace(facts, dtype="bfloat16", device="cuda"))
    assert of(found, counted.PASSING, "base") == 2 * 128 * 64
    assert of(parts.items(config_of(SFTRun), facts), counted.PASSING, "base") == 0


def test_all_weights_are_trained_in_their_own_place(facts):
    config = config_of(SFTRun)
    config.lora.full = True
    found = parts.items(config, facts)
    assert of(found, counted.PARAMETERS) == 4 * NUMBERS
    assert of(found, counted.OPTIMISER) == 8 * NUMBERS


def test_a_bfloat16_base_on_a_cpu_has_its_output_layer_in_float32_too(facts):
    half = replace(facts, dtype="bfloat16")
    found = parts.items(ppo(), half)
    assert of(found, counted.PARAMETERS, "base") == 2 * NUMBERS + 4 * 512 * 64
    assert of(parts.items(ppo(), replace(half, device="cuda")), counted.PARAMETERS, "base") == 2 * NUMBERS
    assert (
        of(parts.items(config_of(RewardRun, reward=Reward()), half), counted.PARAMETERS, "base")
        == 2 * NUMBERS
    )


def ppo(**settings: Any) -> PPORun:
    return config_of(
        PPORun,
        ppo=PPO(**({"batch_size": 8, "micro_batch_size": 4} | settings)),
        generation=Generation(max_new_tokens=6),
    )


def test_ppos_roles(facts):
    held = replace(facts, scorers=("reward", "reward_1", "gold"))
    found = parts.items(ppo(ema_decay=0.9), held)
    assert {item.role for item in found} == {
        "base",
        "policy",
        "ref",
        "reward",
        "reward_1",
        "gold",
        "ema",
        "critic",
        "process",
    }
    for role in ("ref", "reward", "reward_1", "gold", "ema"):
        assert of(found, counted.PARAMETERS, role) == 4 * ADAPTER
    # the value head: 64 weights and a bias
    assert of(found, counted.OPTIMISER, "critic") == 8 * 65
    own = parts.items(ppo(critic="own"), facts)
    assert of(own, counted.OPTIMISER, "critic") == 8 * (ADAPTER + 65)
    # its own forward of 4 x 16 tokens, and 4 x 6 states in float32
    kept = activations.kept(facts.model, training.forward_of(ppo(), facts), 4, 16)
    assert of(own, counted.KEPT, "critic") == kept + 4 * 6 * 64 * 4
    assert "critic" not in {item.role for item in parts.items(ppo(estimator="reinforce"), facts)}
    assert "ref" not in {item.role for item in parts.items(ppo(), replace(facts, reference=False))}


def test_the_cache_has_the_room_that_is_taken_in_advance(model):
    """Keys and values of 2 heads of 16 in 2 layers; 10 + 64 places, and 65 more once the 75th token is there."""
    batch = Batch(rows=3, prompt=10, answer=100)
    assert sampling.cache(model, 4, batch, 1) == 2 * 3 * 2 * 32 * 4 * 74
    assert sampling.cache(model, 4, batch, 65) == 2 * 3 * 2 * 32 * 4 * 74
    assert sampling.cache(model, 4, batch, 66) == 2 * 3 * 2 * 32 * 4 * (74 + 65)


def test_the_caches_room_is_that_of_the_real_one(model):
    import torch

    from rlhf_exp.rollout.cache import _Layer

    for steps in (1, 65, 66, 67, 131):
        layer = _Layer()
        for step in range(steps):
            new = torch.zeros(3, 2, 10 if step == 0 else 1, 16)
            layer.update(new, new)
        held = layer._held[0].nbytes + layer._held[1].nbytes
        assert sampling.cache(model, 4, Batch(3, 10, steps), steps) == 2 * held


def test_windowed_layers_cache_no_more_than_their_window(model):
    windowed = replace(model, window=20, windowed=1)
    assert sampling.cache(windowed, 4, Batch(1, 10, 100), 1) == 2 * 32 * 4 * (74 + 20)


def test_rows_of_a_forward_are_divided_by_the_ranks(facts):
    for ranks, rows in ((1, 4), (2, 4), (4, 2), (3, 3)):
        config = ppo()
        found = parts.items(config, replace(facts, ranks=ranks))
        kept = activations.kept(facts.model, training.forward_of(config, facts), rows, 16)
        assert of(found, counted.KEPT, "policy") == kept
    # 0 is as many as there are, and tokens bound them: 16 a row
    assert of(parts.items(ppo(micro_batch_size=0), facts), counted.KEPT, "policy") == pytest.approx(
        activations.kept(facts.model, training.forward_of(ppo(), facts), 8, 16)
    )
    assert of(parts.items(ppo(micro_batch_tokens=35), facts), counted.KEPT, "policy") == pytest.approx(
        activations.kept(facts.model, training.forward_of(ppo(), facts), 2, 16)
    )


def test_both_answers_of_a_pair_count(facts):
    found = parts.items(config_of(DPORun, dpo=DPO()), facts)
    forward = training.forward_of(config_of(DPORun, dpo=DPO()), facts, padded=True, train=False)
    assert of(found, counted.KEPT) == activations.kept(facts.model, forward, 8, 16)
    assert of(found, counted.PARAMETERS, "ref") == 4 * ADAPTER


def test_rewards_pairs_are_bound_by_tokens(facts):
    """A pair has 10 + 6 + 6 tokens: 50 take two."""
    config = config_of(RewardRun, reward=Reward(micro_batch_tokens=50))
    found = parts.items(config, facts)
    kept = activations.kept_pairs(facts.model, training.forward_of(config, facts), 2, 10, 6, 6)
    assert of(found, counted.KEPT) == kept + 2 * 2 * 1 * 64 * 8
    twice = parts.items(config_of(RewardRun, reward=Reward(share_prompts=False)), facts)
    forward = training.forward_of(config, facts)
    assert of(twice, counted.KEPT) == activations.kept(facts.model, forward, 8, 16) + 2 * 4 * 64 * 8


@pytest.mark.parametrize(
    ("head", "numbers"), [("linear", 64 * 512), ("tied", 4 * 64**2), ("mlp", 2 * 64**2 + 2 * 64 * 512)]
)
def test_ilqls_heads_are_twins_and_their_copies(facts, head, numbers):
    config = config_of(ILQLRun, ilql=ILQL(head=head), generation=Generation())
    found = parts.items(config, facts)
    value = 64 if head == "linear" else 2 * 64**2
    assert of(found, counted.OPTIMISER, "Q and V heads") == 8 * (2 * numbers + value)
    assert of(found, counted.PARAMETERS, "lagging Q heads") == 4 * 2 * numbers


def test_the_peak_is_the_phase_that_needs_most():
    items = [
        Item("base", counted.PARAMETERS, 100.0),
        Item("policy", counted.CACHE, 50.0, (counted.DECODE,)),
        Item("policy", counted.KEPT, 30.0, counted.TRAIN),
        Item("policy", counted.LOGITS, 25.0, (counted.FORWARD,)),
    ]
    assert counted.peak(items) == (counted.FORWARD, 155.0)
    assert counted.phases(items) == [counted.DECODE, counted.FORWARD, counted.BACKWARD]
    assert counted.peak(items[:1]) == ("run", 100.0)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("strategy", "moments", "base"),
    [
        ("ddp", 1, 4 * NUMBERS),
        ("zero1", 4, 4 * NUMBERS),
        ("zero2", 4, 4 * NUMBERS),
        # one table whole, a quarter of the layers, two layers (all there are) gathered, one of them twice
        ("zero3", 4, 4 * 512 * 64 + 4 * (NUMBERS - 512 * 64) * (1 / 4 + 1 + 1 / 2)),
        ("zero3_offload", 4, 4 * 512 * 64 + 4 * (NUMBERS - 512 * 64) * (1 + 1 / 2)),
    ],
)
def test_what_is_sharded(facts, strategy, moments, base):
    config = config_of(SFTRun)
    whole = parts.items(config, facts)
    rank = strategies.on_rank(whole, strategy, 4, facts.model, "float32")
    assert of(rank.device, counted.OPTIMISER) == 8 * ADAPTER / moments
    assert of(rank.device, counted.GRADIENTS, "policy") == 4 * ADAPTER
    assert of(rank.device, counted.PARAMETERS, "base", counted.BACKWARD) == pytest.approx(base)
    assert of(rank.host, counted.PARAMETERS) == (
        pytest.approx(4 * (NUMBERS - 512 * 64) / 4) if strategy == "zero3_offload" else 0
    )


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_what_deepspeed_holds_besides(facts, strategy):
    """Policy and value head are a group each: flat copies of both and a quarter; in the step their gradients as they
    are handed over and as autograd makes them, a quarter of them, and a buffer for the larger."""
    whole = parts.items(ppo(), facts)
    rank = strategies.on_rank(whole, strategy, 4, facts.model, "float32").device
    trained, sharded = 4 * (ADAPTER + 65), strategy != "ddp"
    assert of(rank, counted.PARAMETERS, "DeepSpeed") == sharded * trained * 1.25
    assert of(rank, counted.GRADIENTS, "DeepSpeed", counted.STEP) == sharded * (trained * 2.25 + 4 * ADAPTER)
    assert of(rank, counted.GRADIENTS, "DeepSpeed", counted.BACKWARD) == 0
    more = of(rank, counted.LIBRARIES) - of(whole, counted.LIBRARIES)
    assert more == pytest.approx(sharded * strategies.DEEPSPEED)
    on_cuda = parts.items(ppo(), replace(facts, device="cuda"))
    there = strategies.on_rank(on_cuda, strategy, 4, facts.model, "float32").device
    assert of(there, counted.LIBRARIES) == 0


def test_zero3_gathers_all_layers_to_sample(facts):
    rank = strategies.on_rank(parts.items(ppo(), facts), "zero3", 4, facts.model, "float32")
    layers = 4 * (NUMBERS - 512 * 64)
    assert of(rank.device, counted.PARAMETERS, "base", counted.DECODE) == pytest.approx(
        4 * 512 * 64 + layers * 1.25
    )


def test_what_travels(facts):
    """Of 4 ranks each sends 2 * 3/4 of the gradients; ZeRO again, and the stepped weights; ZeRO-3 the layers too."""
    found = parts.items(config_of(SFTRun), facts)
    config = config_of(SFTRun)

    def volume(name: str, ranks: int = 4) -> travel.Volume:
        config.strategy = Strategy(name=name)
        return travel.volume(config, replace(facts, ranks=ranks), found)

    sent = {name: volume(name) for name in ("ddp", "zero2", "zero3")}
    gradients, layers = 4 * ADAPTER, 4 * (NUMBERS - 512 * 64)
    assert sent["ddp"].step == pytest.approx(1.5 * gradients)
    assert sent["zero2"].step == pytest.approx(3.75 * gradients)
    assert sent["zero3"].step == pytest.approx(3.75 * gradients + 2 * 0.75 * layers)
    assert (sent["ddp"].rollout, sent["zero3"].rollout) == (0, 0)  # nothing is sampled
    assert volume("ddp", 1).step == 0
    # 8 rows of an optimiser step are 2 a rank: cut into single ones, they are 2 forwards and 2 backwards
    config.train.micro_batch_size = 1
    assert volume("zero3").step == pytest.approx(3.75 * gradients + 4 * 0.75 * layers)


@pytest.mark.parametrize(
    ("settings", "ranks", "step", "rollout"),
    [
        # of 8 prompts and 3 answers each: 12 a rank, in forwards of 4
        ({}, 2, 2 * 3, 1 + 3 * 3),
        # of a minibatch 3 a rank; of the rollout 12
        ({"minibatches": 4}, 2, 2 * 1, 1 + 3 * 4),
        # 5 on the fullest rank
        ({"micro_batch_size": 2}, 5, 2 * 3, 1 + 3 * 3),
        # its own critic's forward besides, in the update and in the scores
        ({"critic": "own"}, 2, 4 * 3, 1 + 4 * 3),
        # rows of 16 tokens, so that 35 take two
        ({"micro_batch_tokens": 35}, 2, 2 * 6, 1 + 3 * 6),
    ],
)
def test_ppos_forwards_and_backwards(facts, settings, ranks, step, rollout):
    """Each micro-batch has both; the scores are three forwards of every answer, sampling gathers once."""
    config = ppo(samples_per_prompt=3, **settings)
    assert travel.passes(config, replace(facts, ranks=ranks)) == travel.Passes(step, rollout)


def test_pairs_of_few_tokens_are_more_forwards(facts):
    """8 pairs of 22 tokens on 2 ranks: all 4 of a rank at once, or two by two."""
    for tokens, step in ((0, 2), (50, 4)):
        config = config_of(RewardRun, reward=Reward(micro_batch_tokens=tokens))
        assert travel.passes(config, replace(facts, ranks=2)) == travel.Passes(step, 0)


def test_answers_are_dealt_one_by_one(facts):
    """5 prompts of 3 answers on 2 ranks are 8 rows, not the 9 of three whole prompts."""
    found = parts.items(ppo(batch_size=5, samples_per_prompt=3), replace(facts, ranks=2))
    batch = Batch(rows=8, prompt=10, answer=6)
    assert of(found, counted.CACHE, phase=counted.PREFILL) == sampling.cache(facts.model, 4, batch, 1)


def test_four_separate_models(facts):
    """Policy and critic at 16 bytes a number, reference and reward model at the base's width."""
    found = weights.separate(ppo(), facts)
    assert sum(found.values()) == NUMBERS * (16 + 16 + 4 + 4)


def test_the_table(facts):
    items = [Item("base", counted.PARAMETERS, 2e9), Item("policy", counted.CACHE, 5e7, (counted.DECODE,))]
    lines = list(table.lines("title", items, items, [], 1))
    assert lines[0] == "title"
    assert next(line.split("│") for line in lines if "KV cache" in line)[-1].strip() == "50 MB"
    assert any(line.startswith("sum") and "2.05 GB" in line for line in lines)
    assert "each rank" not in "".join(lines)
    assert "each rank" in "".join(table.lines("title", items, items, [], 2))
    assert [table.gigabytes(x) for x in (3.14e9, 1e8, 9.9e7, 2000)] == ["3.14 GB", "0.10 GB", "99 MB", "2 kB"]
