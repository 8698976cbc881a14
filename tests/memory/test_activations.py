"""What a forward keeps: the formulas against torch's own hooks on saved tensors, for every architecture."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_exp.data.pairs import Pair, pack
from rlhf_exp.memory import activations
from rlhf_exp.memory.activations import Forward
from rlhf_exp.memory.architecture import GROUPS, HEADS, INNER, Architecture
from rlhf_exp.model import attention, fused, lora_linear, slices
from rlhf_exp.model.base import Base
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.rewards.pairs import hidden_states
from rlhf_exp.schema import Lora
from tests.model import architectures
from tests.model.architectures import TABLE

RANK, ROWS, LENGTH = 3, 2, 24
FEW, MORE = 2, 4  # layers: what each layer keeps is the difference
EXACT = ("llama2_7b", "llama3_8b", "smollm2_135m", "qwen2.5_7b", "qwen3_8b", "internlm3_8b")


def base_of(name: str, layers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Base:
    """The scaled-down model with so many layers."""
    (kind, both), full, sizes = TABLE[name]
    key = "n_layer" if "n_layer" in sizes else "num_hidden_layers"
    monkeypatch.setitem(TABLE, name, ((kind, both), full, sizes | {key: layers}))
    base = architectures.small_base(name)
    base.model.to(dtype)
    base.dtype = dtype
    fused.install(base.model)
    if dtype == torch.bfloat16:
        attention.install(base.model)
    return base


def described(base: Base) -> Architecture:
    """The model's sizes, read off the model itself."""
    config: Any = base.model.config

    def first(*names: str) -> int | None:
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    heads, hidden = first(*HEADS), first("hidden_size", "n_embd")
    weights = {
        name: tuple(weight.shape) for name, weight in base.model.named_parameters() if "lora_" not in name
    }
    return Architecture(
        kind=config.model_type.removesuffix("_text"),
        parameters=0,
        layers=MORE,
        hidden=hidden,
        vocabulary=config.vocab_size,
        inner=first(*INNER) or 4 * hidden,
        heads=heads,
        groups=first(*GROUPS) or heads,
        head_size=first("head_dim") or hidden // heads,
        weights={name.replace(".base_layer", ""): shape for name, shape in weights.items()},
    )


class Saved:
    """Sizes of the storages that autograd saves inside, each once, without the model's own weights."""

    def __init__(self, base: Base):
        weights = [*base.model.parameters(), *base.model.buffers()]
        self.own = {weight.untyped_storage().data_ptr() for weight in weights}
        self.found: dict[int, Any] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage
        return x

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.found.values())


def saved(base: Base, name: str, length: int = LENGTH, lora: Lora | None = None, train: bool = False) -> int:
    with Roles(base) as roles:
        roles.new("policy", lora_config(lora or Lora(r=RANK), architectures.conf(name)), 0)
        base.model.train(train)
        kept = Saved(base)
        ids = torch.randint(3, 97, (ROWS, length), generator=torch.Generator().manual_seed(1))
        with kept.hooks:
            roles.trunk("policy", ids)
        base.model.eval()
        return kept.bytes


def forward_of(name: str, dtype: torch.dtype, **more: Any) -> Forward:
    targets = architectures.conf(name).lora_targets
    return Forward(width=dtype.itemsize, device="cpu", targets=targets, rank=RANK, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in TABLE if name != "tiny"])
def test_a_layer_keeps_what_autograd_saves(name, dtype, monkeypatch):
    found = {}
    for layers in (FEW, MORE):
        base = base_of(name, layers, dtype, monkeypatch)
        found[layers] = saved(base, name)
    true = (found[MORE] - found[FEW]) / (MORE - FEW)
    model, forward = described(base), forward_of(name, dtype)
    ours = ROWS * LENGTH * activations.token(model, forward)
    ours += activations.attention(model, forward, ROWS, LENGTH)
    assert ours == pytest.approx(true, rel=0.001 if name in EXACT else 0.07)


@pytest.mark.parametrize("length", [100, 300])
def test_long_texts_in_bfloat16_keep_causal_blocks_of_probabilities(length, monkeypatch):
    """128 queries at a time see the keys up to the last of them: 300 tokens are 128 * 128 + 128 * 256 + 44 * 300."""
    found = [
        saved(base_of("llama3_8b", layers, torch.bfloat16, monkeypatch), "llama3_8b", length)
        for layers in (FEW, MORE)
    ]
    model = described(base_of("llama3_8b", MORE, torch.bfloat16, monkeypatch))
    forward = forward_of("llama3_8b", torch.bfloat16)
    scores = {100: 100 * 100, 300: 128 * 128 + 128 * 256 + 44 * 300}[length]
    assert activations.attention(model, forward, ROWS, length) == 4 * ROWS * model.heads * scores
    ours = ROWS * length * activations.token(model, forward) + activations.attention(
        model, forward, ROWS, length
    )
    assert ours == pytest.approx((found[1] - found[0]) / (MORE - FEW), rel=0.001)


def test_probabilities_of_too_many_scores_are_not_kept():
    forward = forward_of("llama3_8b", torch.bfloat16)
    model = Architecture("llama", 0, 1, 32, 97, 64, heads=4, groups=2, head_size=8, weights={})
    rows = activations.KEPT // (4 * 512 * 512)
    assert activations.attention(model, forward, rows, 512) > 0
    assert activations.attention(model, forward, rows + 1, 512) == 0


def test_the_constants_are_those_of_the_modules_that_import_torch():
    from rlhf_exp.algorithms import logits
    from rlhf_exp.memory import logits as ours
    from rlhf_exp.memory import sampling
    from rlhf_exp.rollout import cache

    assert (activations.QUERIES, activations.KEPT) == (attention.QUERIES, attention.KEPT)
    assert activations.ROWS == slices.ROWS
    assert (ours.CHUNK, ours.GPU, sampling.ROOM) == (logits.LOGIT_BUDGET, logits.GPU_BUDGET, cache.ROOM)


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        # of d = 32, q = 32, m = 64 a token: what the wrapped matrices read, beside both norms' inputs (2 d), q and k
        # and v (32 + 2 * 16), the kernel's output (q) and its sums (4 heads), gate and up (2 m)
        (["q_proj"], 32 + RANK),
        (["q_proj", "v_proj"], 32 + 2 * RANK),
        (["gate_proj"], 32 + RANK),
        (["down_proj"], 64 + RANK),
        (["o_proj"], RANK),  # the kernel keeps it anyway
    ],
)
def test_what_is_not_wrapped_keeps_no_input(targets, inputs, monkeypatch):
    model = described(base_of("llama3_8b", MORE, torch.float32, monkeypatch))
    forward = replace(forward_of("llama3_8b", torch.float32), targets=targets)
    by_hand = 2 * 32 + 2 + (32 + 2 * 16) + 32 + 4 + 2 * 64 + inputs
    assert activations.token(model, forward) == 4 * by_hand
    found = [
        saved(
            base_of("llama3_8b", layers, torch.float32, monkeypatch),
            "llama3_8b",
            lora=Lora(r=RANK, targets=targets),
        )
        for layers in (FEW, MORE)
    ]
    assert found[1] - found[0] == (MORE - FEW) * ROWS * LENGTH * 4 * by_hand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_pefts_own_layers_keep_no_more(dropout, dtype, monkeypatch):
    """With dropout, and on matrices that are quantised: here plain ones that are left to PEFT in the same way.

    Their inputs are not cast to float32 (Roles calls autocast). With dropout each matrix has an input of its own.
    """
    monkeypatch.setattr(lora_linear, "install", lambda layer: None)
    lora = Lora(r=RANK, dropout=dropout)
    bases = [base_of("llama3_8b", layers, dtype, monkeypatch) for layers in (FEW, MORE)]
    found = [saved(base, "llama3_8b", lora=lora, train=True) for base in bases]
    forward = forward_of("llama3_8b", dtype, dropout=dropout > 0)
    ours = ROWS * LENGTH * activations.token(described(bases[1]), forward)
    ours += activations.attention(described(bases[1]), forward, ROWS, LENGTH)
    assert ours == pytest.approx((found[1] - found[0]) / (MORE - FEW), rel=0.05)


def test_all_weights_trained_keep_every_input(monkeypatch):
    found = []
    for layers in (FEW, MORE):
        base = base_of("llama3_8b", layers, torch.float32, monkeypatch)
        base.model.requires_grad_(True)
        kept = Saved(base)
        with kept.hooks:
            base.trunk(input_ids=torch.ones(ROWS, LENGTH, dtype=torch.int64), use_cache=False)
        found.append(kept.bytes)
    ours = activations.token(described(base), forward_of("llama3_8b", torch.float32, full=True))
    assert ROWS * LENGTH * ours == pytest.approx((found[1] - found[0]) / (MORE - FEW), rel=0.03)


def test_recomputation_keeps_a_layers_input_alone(monkeypatch):
    """Each layer more is d numbers a token more; the inside of one layer is there while it is made again."""
    found = []
    for layers in (FEW, MORE):
        base = base_of("llama3_8b", layers, torch.float32, monkeypatch)
        with Roles(base, recompute=True) as roles:
            roles.new("policy", lora_config(Lora(r=RANK), architectures.conf("llama3_8b")), 0)
            kept = Saved(base)
            with kept.hooks:
                roles.trunk("policy", torch.ones(ROWS, LENGTH, dtype=torch.int64))
            found.append(kept.bytes)
    model = described(base)
    plain = forward_of("llama3_8b", torch.float32)
    forward = replace(plain, recomputed=True)
    assert (found[1] - found[0]) / (MORE - FEW) == ROWS * LENGTH * 32 * 4
    layer = ROWS * LENGTH * activations.token(model, plain)
    inputs, ends = MORE * ROWS * LENGTH * 32 * 4, 2 * ROWS * LENGTH * 32 * 4
    assert activations.kept(model, forward, ROWS, LENGTH) == inputs + layer + ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_in_one_row_keep_each_prompt_once(dtype, monkeypatch):
    draw = torch.Generator().manual_seed(2)
    prompt, chosen, rejected = 150, 40, 30

    def ids(number: int) -> list[int]:
        return torch.randint(3, 97, (number,), generator=draw).tolist()

    pairs = [Pair(ids(prompt), ids(chosen), ids(rejected)) for _ in range(2)]
    found = []
    for layers in (FEW, MORE):
        base = base_of("llama3_8b", layers, dtype, monkeypatch)
        with Roles(base) as roles:
            roles.new("reward", lora_config(Lora(r=RANK), architectures.conf("llama3_8b")), 0)
            kept = Saved(base)
            with kept.hooks:
                hidden_states(roles, "reward", pack(pairs), share=True)
            found.append(kept.bytes)
    model, forward = described(base), forward_of("llama3_8b", dtype)
    ours = activations.kept_pairs(model, forward, 2, prompt, chosen, rejected)
    ends = 2 * (prompt + chosen + rejected) * 2 * 32 * dtype.itemsize
    assert (ours - ends) / MORE == pytest.approx((found[1] - found[0]) / (MORE - FEW), rel=0.02)


def test_a_forward_without_gradient_needs_its_widest_place():
    """d = 32, m = 64, 10 tokens in float32: the stream twice, and gate, up and product; or attention where wider."""
    model = Architecture("llama", 0, 1, 32, 97, 64, heads=4, groups=2, head_size=8, weights={})
    assert activations.passing(model, 4, 10) == 10 * 4 * (2 * 32 + 3 * 64)
    wide = replace(model, head_size=64)
    assert activations.passing(wide, 4, 10) == 10 * 4 * (2 * 32 + 3 * 256 + 3 * 128)
    assert activations.backward(model, 2, 10) == 10 * 2 * (4 * 64 + 2 * 32)
    assert math.isclose(activations.causal(300, 128), 128 * 128 + 128 * 256 + 44 * 300)
