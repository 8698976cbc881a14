"""Baichuan's mathematics, against a reference written out here in loops and against transformers' Llama."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rlhf_exp.model.baichuan import alibi
from rlhf_exp.model.baichuan.config import BaichuanConfig
from rlhf_exp.model.baichuan.modeling import BaichuanForCausalLM
from rlhf_exp.model.base import Base, load_base
from rlhf_exp.rollout.engine import generate
from rlhf_exp.schema import Generation, Model
from tests.model.baichuan_folder import GATED, KINDS, LAYERS, VOCABULARY, WIDTH, weights_of, write_baichuan

# by hand: 2^-2, 2^-4, 2^-6, 2^-8 of four heads, then every second one of eight: 2^-1, 2^-3
SLOPES = {4: [1 / 4, 1 / 16, 1 / 64, 1 / 256], 6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]}


def load(folder: Path, dtype: str = "float32") -> Base:
    return load_base(Model(name="baichuan", path=str(folder), dtype=dtype), "cpu")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("baichuan")
    return {kind: load(write_baichuan(root / kind, kind)) for kind in KINDS}


@pytest.fixture(params=list(KINDS))
def base(request, bases) -> Base:
    return bases[request.param]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def reference(kind: str, row: list[int]) -> Tensor:
    """Logits [T, V] of one row in float64, head by head and query by query."""
    w = {name: tensor.double() for name, tensor in weights_of(kind).items()}
    heads = KINDS[kind][0]
    size = WIDTH // heads

    def normed(x: Tensor, name: str) -> Tensor:
        return w[name] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(x: Tensor, place: int) -> Tensor:
        out = x.clone()
        for i in range(size // 2):
            angle = place * 10000.0 ** (-2 * i / size)
            a, b = x[i], x[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][row]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        q, k, v = (normed(x, f"{at}.input_layernorm.weight") @ w[f"{at}.self_attn.W_pack.weight"].T).split(
            WIDTH, 1
        )
        attended = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(len(row)):
                scores = []
                for j in range(i + 1):
                    if "13b" in kind:
                        scores.append(q[i, part] @ k[j, part] / size**0.5 - SLOPES[heads][head] * (i - j))
                    else:
                        scores.append(rotated(q[i, part], i) @ rotated(k[j, part], j) / size**0.5)
                for j, weight in enumerate(torch.stack(scores).softmax(0)):
                    attended[i, part] += weight * v[j, part]
        x = x + attended @ w[f"{at}.self_attn.o_proj.weight"].T
        y = normed(x, f"{at}.post_attention_layernorm.weight")
        gate = y @ w[f"{at}.mlp.gate_proj.weight"].T
        up = y @ w[f"{at}.mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if kind.startswith("baichuan2"):
        head = head / head.square().sum(1, keepdim=True).sqrt()
    return normed(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_written_out_model(bases, ids, kind):
    logits = bases[kind].model(ids).logits
    for row in range(2):
        assert (logits[row] - reference(kind, ids[row].tolist())).abs().max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_log_probs_are_read_from_is_the_written_out_model_too(bases, ids, kind):
    """Base.output_layer: with NormHead the weight itself must be the normalised one."""
    weight, bias = bases[kind].output_layer
    logits = bases[kind].trunk(input_ids=ids).last_hidden_state @ weight.T
    assert bias is None
    assert (logits[0] - reference(kind, ids[0].tolist())).abs().max() < 2e-5


def test_the_eager_implementation_computes_the_same(base, ids):
    expected = base.model(ids).logits
    base.model.set_attn_implementation("eager")
    try:
        found = base.model(ids, output_attentions=True, output_hidden_states=True)
    finally:
        base.model.set_attn_implementation("sdpa")
    assert (found.logits - expected).abs().max() < 1e-5
    assert len(found.attentions) == LAYERS and found.attentions[0].shape == (
        2,
        base.model.config.num_attention_heads,
        9,
        9,
    )
    assert torch.equal(found.attentions[0].triu(1), torch.zeros_like(found.attentions[0]))
    assert len(found.hidden_states) == LAYERS + 1


# ---------------------------------------------------------------- against Llama


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    """The 7B-shaped model with W_pack split into Llama's three matrices."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=GATED,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            pad_token_id=0,
        )
    )
    state = {}
    for name, tensor in weights_of("7b").items():
        if name.endswith("W_pack.weight"):
            for part, matrix in zip("qkv", tensor.split(WIDTH), strict=True):
                state[name.replace("W_pack", f"{part}_proj")] = matrix
        else:
            state[name] = tensor
    model.load_state_dict(state)
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def padded(bases) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, position_ids [3, 8] of rows of 8, 5 and 2 tokens, padded on the left."""
    lengths = torch.tensor([8, 5, 2])
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(8)[None] >= 8 - lengths[:, None]).long()
    ids = torch.randint(3, VOCABULARY, (3, 8), generator=generator) * mask
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


# bfloat16: two units in the last place of the largest logits (between 4 and 8) are 1/16
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_7b_is_a_llama_with_packed_weights(tmp_path, padded, dtype, tolerance):
    ours = load(write_baichuan(tmp_path / "7b", "7b"), dtype).model
    theirs = llama(getattr(torch, dtype))
    ids, mask, positions = padded
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    mine, yours = ours(**inputs), theirs(**inputs)
    real = mask.bool()
    assert mine.logits.dtype == getattr(torch, dtype) and yours.logits[real].abs().max() > 2
    assert (mine.logits[real] - yours.logits[real]).abs().max() < tolerance
    # and one more token on each cache
    step = {
        "input_ids": torch.tensor([[7], [8], [9]]),
        "attention_mask": torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1),
        "position_ids": positions[:, -1:] + 1,
    }
    mine = ours(**step, past_key_values=mine.past_key_values).logits
    yours = theirs(**step, past_key_values=yours.past_key_values).logits
    assert (mine - yours).abs().max() < tolerance


# ---------------------------------------------------------------- ALiBi, padding, cache


def test_slopes_are_those_of_the_paper_and_of_its_code_between_powers_of_two():
    assert alibi.slopes(1) == [2**-8]
    assert alibi.slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi.slopes(6) == SLOPES[6]
    # 13B: 2^(-i/4) of 32 heads, then 2^(-1/8), 2^(-3/8) ... of 64
    expected = [2 ** (-i / 4) for i in range(1, 33)] + [2 ** (-i / 8) for i in range(1, 16, 2)]
    assert alibi.slopes(40) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_no_real_token(base, padded, attention):
    ids, mask, positions = padded
    base.model.set_attn_implementation(attention)
    try:
        hidden = base.trunk(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    finally:
        base.model.set_attn_implementation("sdpa")
    assert torch.isfinite(hidden).all()
    for row, length in enumerate((8, 5, 2)):
        alone = base.trunk(input_ids=ids[row : row + 1, 8 - length :]).last_hidden_state[0]
        assert (hidden[row, 8 - length :] - alone).abs().max() < 2e-6
        # on the right, as the stages score: without a mask
        filled = torch.full((1, length + 3), 17)
        filled[0, :length] = ids[row, 8 - length :]
        right = base.trunk(input_ids=filled, use_cache=False).last_hidden_state[0, :length]
        assert (right - alone).abs().max() < 2e-6


def test_one_token_at_a_time_equals_all_at_once(base, padded):
    ids, mask, positions = padded
    whole = base.trunk(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    cache = DynamicCache(config=base.model.config)
    for start, stop in ((0, 3), (3, 4), (4, 7), (7, 8)):  # chunks longer than 1 on a cache too
        part = base.trunk(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        real = mask[:, start:stop].bool()
        assert (part[real] - whole[:, start:stop][real]).abs().max() < 3e-6


def test_chunks_on_a_cache_without_a_mask(base, ids):
    whole = base.trunk(input_ids=ids).last_hidden_state
    cache = DynamicCache(config=base.model.config)
    parts = [
        base.trunk(input_ids=ids[:, part], past_key_values=cache, use_cache=True).last_hidden_state
        for part in (slice(0, 4), slice(4, 8), slice(8, 9))
    ]
    assert (torch.cat(parts, 1) - whole).abs().max() < 3e-6


def test_alibi_in_bfloat16_stays_near_float32(bases, tmp_path):
    """Distances of hundreds: a bias by absolute places would lose the near ones in bfloat16's eight bits."""
    ids = torch.randint(3, VOCABULARY, (1, 700), generator=torch.Generator().manual_seed(3))
    exact = bases["13b"].trunk(input_ids=ids).last_hidden_state
    low = load(write_baichuan(tmp_path / "13b", "13b"), "bfloat16")
    whole = low.trunk(input_ids=ids).last_hidden_state
    assert exact.abs().mean() > 0.5
    assert (whole.float() - exact).abs().mean() < 0.02
    # and the last 20 tokens one by one on a cache
    cache = DynamicCache(config=low.model.config)
    low.trunk(input_ids=ids[:, :680], past_key_values=cache, use_cache=True)
    steps = [
        low.trunk(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).last_hidden_state
        for i in range(680, 700)
    ]
    assert (torch.cat(steps, 1).float() - exact[:, 680:]).abs().mean() < 0.02


# ---------------------------------------------------------------- generation


def recomputed(base: Base, prompt: list[int], steps: int) -> list[int]:
    """The most probable continuation, each token from a forward over everything before it."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_generation_equals_recomputation(base, padded):
    ids, mask, _ = padded
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    expected = [recomputed(base, prompt, 12) for prompt in prompts]
    theirs = base.model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert theirs[:, 8:].tolist() == expected
    ours = generate(
        base, torch.no_grad, prompts, [1, 2, 3], Generation(max_new_tokens=12, min_new_tokens=0, top_k=1)
    ).responses
    assert ours == [cut(row, base.eos_id) for row in expected]


def cut(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row


def test_rows_leave_the_batch_while_others_go_on(base, padded):
    """The engine's batch_select_indices, with an answer that ends early."""
    ids, mask, _ = padded
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    expected = [recomputed(base, prompt, 12) for prompt in prompts]
    stop = expected[0][2]
    base = replace(base, tokenizer=SimpleNamespace(eos_token_id=stop, pad_token_id=0))
    ours = generate(base, torch.no_grad, prompts, [1, 2, 3], Generation(max_new_tokens=12, top_k=1)).responses
    assert ours == [cut(row, stop) for row in expected]
    assert len(ours[0]) <= 3


# ---------------------------------------------------------------- which of the models a config describes


def test_positions_go_by_the_config_not_by_the_name_of_the_architecture():
    for name in ("BaiChuanForCausalLM", "BaichuanForCausalLM"):
        assert not BaichuanConfig(architectures=[name], max_position_embeddings=4096).alibi
        assert BaichuanConfig(architectures=[name], model_max_length=4096).alibi


@pytest.mark.parametrize(
    "entries, normalises",
    [
        ({"vocab_size": 64000}, False),
        ({"vocab_size": 64010}, False),  # Baichuan 1 with tokens added
        ({"vocab_size": 125696}, True),
        ({"vocab_size": 125700}, True),
        ({"vocab_size": 64000, "z_loss_weight": 0}, True),
        ({"vocab_size": 125696, "norm_head": False}, False),
        ({"vocab_size": 64000, "norm_head": True}, True),
    ],
)
def test_norm_head_goes_by_the_vocabulary_or_a_field(entries, normalises):
    assert BaichuanConfig(**entries).normalises_head is normalises


def test_norm_head_trains_under_its_constraint_until_it_is_folded(ids):
    """A model constructed by hand: the logits do not depend on the rows' lengths, before and after."""
    config = BaichuanConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        z_loss_weight=0,
    )
    torch.manual_seed(0)
    model = BaichuanForCausalLM(config)
    logits = model(ids).logits
    with torch.no_grad():
        model.lm_head.weight *= 3
    assert (model(ids).logits - logits).abs().max() < 1e-6
    model.fold_norm_head()
    assert (model.lm_head.weight.norm(dim=1) - 1).abs().max() < 1e-6
    assert (model(ids).logits - logits).abs().max() < 1e-6
    folded = model.lm_head.weight.clone()
    model.fold_norm_head()
    assert torch.equal(model.lm_head.weight, folded)
    # from here on it is a plain layer
    with torch.no_grad():
        model.lm_head.weight *= 3
    assert (model(ids).logits - 3 * logits).abs().max() < 1e-5


def test_a_loss_is_that_of_the_next_tokens(base, ids):
    logits = base.model(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)
    )
    assert (base.model(ids, labels=ids).loss - expected).abs() < 1e-5
