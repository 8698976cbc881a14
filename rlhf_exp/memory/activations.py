"""What a forward keeps for its backward, and what it needs for a moment: bytes, counted operation by operation.

Of a layer of Llama's kind, in numbers a token (d hidden, m inner, q and k widths of queries and keys, r rank; what is
shared is counted once, and what an operation keeps only if LoRA wraps the matrix in brackets):

    both norms' inputs             2 d, and a float32 each                (model/fused.py)
    inputs of q, k, v              d [q_proj, k_proj or v_proj]           (model/lora_linear.py)
    rotated q and k; v             q + 2 k
    attention's output             q; torch's kernel also a float32 a head, of the softmax's sum
    inputs of gate and up          d [gate_proj or up_proj]
    gate and up                    2 m
    input of down                  m [down_proj]
    x A^T of every wrapped matrix  r each

Others differ by what FAMILIES says. On a CPU in bfloat16 (model/attention.py) short texts' probabilities stay as
well, in float32. tests/memory counts the same with torch's hooks on saved tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_exp.memory.architecture import Architecture

QUERIES, KEPT = 128, 2**22  # of model/attention.py, which imports torch: a test holds them together
ROWS = 128  # of model/slices.py
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Family:
    """How an architecture's layer differs from Llama's."""

    norms: int = 2  # hidden-sized inputs of norms
    wide_norms: bool = False  # kept in float32 whatever the base runs in
    activation: int = 2  # inner-sized numbers that the MLP keeps besides the input of its last matrix
    product: bool = True  # whether that input is a tensor of its own
    packed: bool = False  # q, k and v are views of one tensor, which stays as long as v does
    rotary: bool = True  # q and k are made anew with positions
    copied: bool = False  # attention's output is copied into another order
    normed: bool = False  # q and k are normed, and their inputs stay
    eager: bool = False  # attention's probabilities stay


_LLAMA = Family()
FAMILIES = {
    "baichuan": Family(packed=True),
    "qwen3": Family(normed=True),
    "gemma3": Family(norms=4, wide_norms=True, activation=3, normed=True),
    "glm4": Family(norms=4, activation=3, copied=True),
    "gpt2": Family(activation=4, packed=True, rotary=False),
    "gptj": Family(norms=1, activation=4, eager=True),
    "gpt_neox": Family(norms=1, activation=1, packed=True, copied=True),  # both norms read the same
    "opt": Family(activation=1, product=False, rotary=False),
    "bloom": Family(activation=1, rotary=False, eager=True),
    "bert": Family(activation=1, rotary=False),  # encoders, which nothing trains
}


def family(kind: str) -> Family:
    return FAMILIES.get(kind, _LLAMA)


@dataclass(frozen=True)
class Forward:
    """How a stage computes: what decides the bytes of a token besides the model."""

    width: int  # bytes of a number of the base
    device: str  # cpu or cuda
    targets: Sequence[str]
    rank: int
    dropout: bool = False  # LoRA's own
    full: bool = False  # all weights are trained
    padded: bool = False  # a mask goes in, and keys are repeated for the heads that share them
    recomputed: bool = False  # activation checkpointing: a layer's input stays, the rest is made again

    @property
    def own_attention(self) -> bool:
        """Whether attention is model/attention.py's, which keeps no output, but may keep probabilities."""
        return self.width == 2 and self.device == "cpu"


def token(model: Architecture, forward: Forward) -> float:
    """Bytes a token that one layer keeps, without what grows with the square of the length."""
    kind, w = family(model.kind), forward.width
    d, m, q, k = model.hidden, model.inner, model.query, model.key
    matrices = _matrices(model)
    wrapped = {name for name in matrices if forward.full or name in forward.targets}
    norm = d * (FLOAT if kind.wide_norms else w) * (2 if forward.full else 1)
    total = kind.norms * (norm + FLOAT)
    inputs: dict[str, int] = {}  # what is read -> its width; q, k, v and gate, up read the same
    for name in wrapped:
        role, width = _reads(name, model)
        inputs[role] = width
        total += 0 if forward.full else forward.rank * w
        total += (
            2 * width * w if forward.dropout else 0
        )  # what was drawn, and what that leaves, of each matrix
    if forward.dropout:
        inputs = {}
    packed = q + 2 * k
    if kind.packed:
        total += (packed + (q + k if kind.rotary else 0)) * w
    elif forward.padded and not forward.own_attention and not kind.eager:
        total += 3 * q * w
    else:
        total += packed * w
    total += (
        (q + k) * (FLOAT if kind.wide_norms else w) + FLOAT * (model.heads + model.groups)
        if kind.normed
        else 0
    )
    torchs = not forward.own_attention and not kind.eager
    if torchs:
        total += model.heads * FLOAT
        inputs["attended"] = q  # the kernel keeps its output, wrapped or not
    total += q * w if kind.copied and torchs else 0
    total += kind.activation * m * w
    if not kind.product:
        inputs.pop("product", None)
    return total + sum(inputs.values()) * w


def _matrices(model: Architecture) -> list[str]:
    """The last names of a layer's matrices, each once for each place in the layer."""
    found = {name.removesuffix(".weight").rpartition(".")[2] for name in _first_layer(model)}
    return sorted(found)


def _first_layer(model: Architecture) -> list[str]:
    return [name for name, shape in model.weights.items() if len(shape) == 2 and ".0." in f".{name}"]


READS = {
    "attended": ("o_proj", "out_proj", "dense"),
    "product": ("down_proj", "fc2", "fc_out", "dense_4h_to_h"),
    "second": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
}


def _reads(name: str, model: Architecture) -> tuple[str, int]:
    """What a matrix reads, and how wide that is; gpt2's c_proj is two matrices."""
    if name == "c_proj":
        return "attended and product", model.query + model.inner
    role = next((role for role, names in READS.items() if name in names), "first")
    if role == "second" and model.kind == "gptj":
        role = "first"  # attention and MLP read the same
    width = {"attended": model.query, "product": model.inner}.get(role, model.hidden)
    return role, width


def attention(model: Architecture, forward: Forward, rows: int, length: int) -> float:
    """Bytes that one layer's attention keeps of texts [rows, length] besides `token`: probabilities."""
    square = rows * model.heads * length * length
    if family(model.kind).eager:  # the softmax in float32, and a copy of it in the base's dtype
        return square * (FLOAT + (forward.width if forward.width < FLOAT else 0))
    if not forward.own_attention or square > KEPT:
        return 0.0
    if forward.padded:
        return square * FLOAT
    return rows * model.heads * FLOAT * causal(length, QUERIES)


def causal(length: int, block: int, before: int = 0) -> float:
    """Scores of a text's blocks of queries with the keys up to each block's last: about half of the square."""
    ends = [min(start + block, length) for start in range(0, length, block)]
    starts = range(0, length, block)
    return float(sum((end - start) * (before + end) for start, end in zip(starts, ends, strict=True)))


def kept(model: Architecture, forward: Forward, rows: int, length: int) -> float:
    """Bytes that the forward of texts [rows, length] keeps: all layers, the last norm, the hidden states."""
    tokens = rows * length
    layer = tokens * token(model, forward) + attention(model, forward, rows, length)
    ends = tokens * 2 * model.hidden * forward.width
    if forward.recomputed:
        return model.layers * tokens * model.hidden * forward.width + layer + ends
    return model.layers * layer + ends


def kept_pairs(
    model: Architecture, forward: Forward, pairs: int, prompt: int, chosen: int, rejected: int
) -> float:
    """The like for comparisons in one row, each prompt once (model/slices.py): [pairs x (p + c + r)].

    The softmax's weights stay, in the base's dtype: of each answer's blocks with the keys before.
    """
    tokens = pairs * (prompt + chosen + rejected)
    scores = causal(prompt + chosen, ROWS) + causal(rejected, ROWS, before=prompt)
    own = Forward(**(vars(forward) | {"padded": False}))
    layer = tokens * token(model, own)
    if forward.device == "cpu":
        if not own.own_attention and not family(model.kind).eager:
            layer -= tokens * model.heads * FLOAT  # no kernel of torch's
        layer += pairs * model.heads * scores * forward.width
    else:  # keys and values are repeated for the heads, and the prompt's stand before both answers
        layer += (
            forward.width
            * pairs
            * (2 * prompt * model.query + 2 * tokens / pairs * (model.query - model.key))
        )
    ends = tokens * 2 * model.hidden * forward.width
    if forward.recomputed:
        return model.layers * tokens * model.hidden * forward.width + layer + ends
    return model.layers * layer + ends


def passing(model: Architecture, width: int, tokens: int) -> float:
    """Bytes of a forward without gradient: the stream, its normed copy, and the widest place of a layer.

    That is gate, up and their product, or q, k, v, the rotated q and k, and attention's output.
    """
    kind = family(model.kind)
    inner = (1 + kind.activation) * model.inner
    attended = 3 * model.query + 3 * model.key
    return tokens * width * (2 * model.hidden + max(inner, attended))


def backward(model: Architecture, width: int, tokens: int) -> float:
    """Bytes of the gradients in the widest place of a backward: the gated MLP's, and the stream's own.

    Of silu(gate) * up: the gradient that comes, both that go, and a product between them.
    """
    return tokens * width * (4 * model.inner + 2 * model.hidden)
