"""Single parts of an iteration against the way that transformers, PEFT and plain torch take: CPU time side by side.

    python benchmarks/parts.py                 one thread, the sizes of the 41M Llama in benchmarks/shapes.py

Each line is the best of several alternating repeats of both ways, forward and backward (decoding: forward alone).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from shapes import LORA_ALPHA, LORA_RANK, SHAPES  # noqa: E402

Way = Callable[[], object]
SHAPE = SHAPES["llama"]
ROWS, TOKENS = SHAPE.batch, SHAPE.prompt + SHAPE.response


def best(ways: list[Way], repeats: int) -> list[float]:
    """Milliseconds of CPU time, the least of each."""
    found = [float("inf")] * len(ways)
    for _ in range(repeats + 1):
        for i, way in enumerate(ways):
            start = time.process_time()
            way()
            found[i] = min(found[i], 1e3 * (time.process_time() - start))
    return found


def through(function: Callable[..., Tensor], *tensors: Tensor) -> Way:
    """Forward and backward; gradients of those that want one."""

    def way() -> None:
        for tensor in tensors:
            tensor.grad = None
        out = function(*tensors)
        out.backward(torch.ones_like(out))

    return way


def attention(dtype: torch.dtype) -> Iterator[tuple[str, list[Way]]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from rlhf_exp.model import attention as ours

    module, heads = SimpleNamespace(is_causal=True), SHAPE.hidden // 64
    q, k, v = (torch.randn(ROWS, heads, TOKENS, 64).to(dtype).requires_grad_() for _ in range(3))
    ways = [
        through(lambda *x, f=f: f(module, *x, None, scaling=0.125)[0], q, k, v)
        for f in (sdpa_attention_forward, ours.attention)
    ]
    yield f"attention, {ROWS} x {heads} heads x {TOKENS} x 64", ways
    last, k, v = q[:, :, -1:].detach(), k.detach(), v.detach()
    mask = torch.ones(ROWS, 1, 1, TOKENS, dtype=torch.bool)
    calls = (sdpa_attention_forward, ours.attention)
    yield (
        f"attention of one token over {TOKENS}",
        [lambda f=f: f(module, last, k, v, mask, scaling=0.125) for f in calls],
    )


def layers(dtype: torch.dtype) -> Iterator[tuple[str, list[Way]]]:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    from rlhf_exp.model import frozen_linear, fused, lora_linear

    d, m = SHAPE.hidden, SHAPE.intermediate
    x = torch.randn(ROWS, TOKENS, d).to(dtype).requires_grad_()
    norm = LlamaRMSNorm(d).to(dtype).requires_grad_(False)
    yield "RMSNorm", [through(norm.forward, x), through(lambda x: fused.norm_forward(norm, x), x)]
    mlp = LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=m)).to(dtype).requires_grad_(False)
    ours = deepcopy(mlp)
    frozen_linear.install(ours)
    yield (
        f"gated MLP {d} -> {m} -> {d}",
        [through(mlp.forward, x), through(lambda x: fused.mlp_forward(ours, x), x)],
    )
    model = torch.nn.Sequential(torch.nn.Linear(d, m, bias=False)).to(dtype)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["0"])
    layer = inject_adapter_in_model(config, model, "policy")[0]
    layer.cast_input_dtype_enabled = False

    def peft(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return layer.forward(x)

    yield (
        f"LoRA layer {d} -> {m}, rank {LORA_RANK}",
        [
            through(peft, x),
            through(lambda x: lora_linear.forward(layer, x), x),
        ],
    )


def vocabulary(dtype: torch.dtype) -> Iterator[tuple[str, list[Way]]]:
    from rlhf_exp.algorithms.logprob import linear_logprobs

    count = SHAPE.batch * SHAPE.response
    hidden = torch.randn(count, SHAPE.hidden).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(SHAPE.vocabulary, SHAPE.hidden)).to(dtype)
    targets = torch.randint(0, SHAPE.vocabulary, (count,))

    def plain(hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight).float()
        return logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)

    ways = [
        through(plain, hidden),
        through(lambda x: linear_logprobs(x, weight, None, targets, entropy=False).logprobs, hidden),
    ]
    yield f"log-probs of {count} tokens, V {SHAPE.vocabulary}", ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| part | float32: usual ms | ours | ratio | bfloat16: usual ms | ours | ratio |")
    print("|---|---|---|---|---|---|---|")
    for parts in (attention, layers, vocabulary):
        pairs = zip(*(parts(dtype) for dtype in (torch.float32, torch.bfloat16)), strict=True)
        for (name, wide), (_, low) in pairs:
            times = [best(ways, options.repeats) for ways in (wide, low)]
            cells = [f"{a:.2f} | {b:.2f} | {a / b:.2f}" for a, b in times]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
