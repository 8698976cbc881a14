"""What a stage holds: by role, by kind, and in which of its phases.

Bytes of one process that does all the work; strategies.py says what is left of them on each of several. A phase's
sum is what it needs, the largest of these is the peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_exp.memory import activations
from rlhf_exp.memory.activations import FLOAT, Forward
from rlhf_exp.memory.architecture import Architecture
from rlhf_exp.model import quantize, shapes
from rlhf_exp.schema import (
    DPORun,
    EvalRun,
    ExportRun,
    ILQLRun,
    KTORun,
    PPORun,
    PreferRun,
    ProbeRun,
    RewardRun,
    RFTRun,
    Run,
    SFTRun,
)

# kinds
PARAMETERS, GRADIENTS, OPTIMISER = "parameters", "gradients", "optimiser"
KEPT, PASSING, CACHE, LOGITS = "activations", "passing", "KV cache", "logits"
# phases
PREFILL, DECODE, SCORE, FORWARD, BACKWARD = "prefill", "decode", "score", "loss", "backward"
TRAIN = (FORWARD, BACKWARD)
BYTES = {"bfloat16": 2, "float32": 4}
ROOM = 64  # of rollout/cache.py
CHUNK = 2**22  # LOGIT_BUDGET of algorithms/logits.py; on a GPU GPU_BUDGET times as many
GPU = 8
TILE = (4096, 32768)  # TRL's: positions and tokens of the vocabulary that its fused head works on at once
# float32 arrays of such a tile that are there together: TRL's torch code in its backward (the product, scaled, over
# the temperature, log p, p, the gradient, the targets and two terms of the sum), our own code in the forward
TRL_ARRAYS, OUR_ARRAYS = 8.25, 3.0
EVAL_ROWS = 64  # answers that eval generates together
# bytes a trained number of Adam's moments; of 8 bits a byte each, and a float32 for 256 of them
MOMENTS = {"float32": 8.0, "8bit": 2 * (1 + FLOAT / 256)}


@dataclass(frozen=True)
class Item:
    """Bytes of one kind that a role holds in some phases; () are all."""

    role: str
    kind: str
    bytes: float
    phases: tuple[str, ...] = ()
    label: str = ""  # more exactly what it is

    def there(self, phase: str) -> bool:
        return not self.phases or phase in self.phases


@dataclass(frozen=True)
class Facts:
    """What a stage's memory depends on besides its config."""

    model: Architecture
    dtype: str  # of the base
    device: str  # cpu or cuda
    targets: tuple[str, ...]
    scorers: tuple[str, ...] = ()  # roles of the reward models it holds, gold and ensemble included
    reference: bool = True  # whether there is an SFT adapter, so that the reference has one
    judge: float = 0.0  # bytes of a judge's own weights
    ranks: int = 1

    @property
    def width(self) -> int:
        return BYTES[self.dtype]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens."""

    rows: int
    prompt: int
    answer: int

    @property
    def length(self) -> int:
        return self.prompt + self.answer

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def items(config: Run, facts: Facts) -> list[Item]:
    """Everything that a stage holds, the base first."""
    return [*_base(config, facts), *_of_stage(config, facts)]


def peak(found: list[Item]) -> tuple[str, float]:
    """The phase that needs most, and what it needs."""
    sums = {phase: sum(i.bytes for i in found if i.there(phase)) for phase in phases(found)}
    return max(sums.items(), key=lambda pair: pair[1])


def phases(found: list[Item]) -> list[str]:
    """In the order in which they come; a stage that has none is one."""
    there = {phase for item in found for phase in item.phases}
    return [phase for phase in (PREFILL, DECODE, SCORE, *TRAIN) if phase in there] or ["run"]


# ---------------------------------------------------------------- weights


def base_bytes(model: Architecture, dtype: str, quantization: str) -> float:
    """Bytes of the frozen base. Quantised are the matrices of its layers, but not what has a row for each token."""
    width = BYTES[dtype]
    if quantization == "none":
        return model.parameters * width
    vectors = sum(math.prod(shape) for shape in model.weights.values() if len(shape) < 2)
    kept = model.by_token + vectors
    return kept * width + (model.parameters - kept) * quantize.BYTES[quantization]


def _base(config: Run, facts: Facts) -> Iterator[Item]:
    model = facts.model
    if config.lora.full and isinstance(config, SFTRun):
        yield from _trained("base", model.parameters, config, label="all weights")
        return
    yield Item("base", PARAMETERS, base_bytes(model, facts.dtype, config.model.quantization))
    ours = not isinstance(config, SFTRun | RewardRun | DPORun | KTORun | ExportRun | ProbeRun)
    if ours and facts.width == 2 and facts.device == "cpu":
        output = model.vocabulary * model.hidden
        yield Item("base", PARAMETERS, output * FLOAT, label="output layer in float32")


def _trained(
    role: str, numbers: float, config: Any, phases: tuple[str, ...] = TRAIN, label: str = ""
) -> Iterator[Item]:
    """Float32 weights that are trained; gradients are there from backward to step."""
    yield Item(role, PARAMETERS, FLOAT * numbers, label=label)
    yield Item(role, GRADIENTS, FLOAT * numbers, phases)
    yield Item(role, OPTIMISER, MOMENTS[config.optim.moments] * numbers)


def _frozen(role: str, numbers: float) -> Item:
    return Item(role, PARAMETERS, FLOAT * numbers)


# ---------------------------------------------------------------- stages


def _of_stage(config: Run, facts: Facts) -> Iterator[Item]:
    if isinstance(config, SFTRun):
        yield from _sft(config, facts)
    elif isinstance(config, RewardRun):
        yield from _reward(config, facts)
    elif isinstance(config, DPORun | KTORun):
        yield from _direct(config, facts)
    elif isinstance(config, ILQLRun):
        yield from _ilql(config, facts)
    elif isinstance(config, RFTRun):
        yield from _rft(config, facts)
    elif isinstance(config, ExportRun):
        merged = config.export.form == "merged"
        copy = facts.model.parameters * FLOAT if merged else FLOAT * _numbers(config, facts)
        yield Item("export", PARAMETERS, copy, label="merged weights" if merged else "adapter")
    elif isinstance(config, ProbeRun):
        yield _frozen("reward", _numbers(config, facts))
        yield _scoring(
            config,
            facts,
            Batch(EVAL_ROWS, config.dataset.max_prompt_tokens, config.dataset.max_response_tokens),
        )
    elif isinstance(config, PPORun):
        yield from _ppo(config, facts)
    elif isinstance(config, EvalRun | PreferRun):
        yield from _answering(config, facts)


def _numbers(config: Run, facts: Facts) -> int:
    """Of one adapter."""
    lora = config.lora
    return facts.model.adapter(facts.targets, lora.r, lora.dora)


def forward_of(config: Run, facts: Facts, *, padded: bool = False, train: bool = True) -> Forward:
    """train: whether LoRA's dropout is on, which PPO and the like leave out."""
    full = config.lora.full and isinstance(config, SFTRun)
    return Forward(
        width=facts.width,
        device=facts.device,
        targets=facts.targets,
        rank=config.lora.r,
        dropout=train and config.lora.dropout > 0 and not full,
        full=full,
        padded=padded,
        recomputed=config.memory.gradient_checkpointing,
    )


def micro_rows(config: Run, facts: Facts, batch: int) -> int:
    """Rows (pairs) of a forward on one rank, of `batch` an optimiser step; 0 (as many as fit) counts as all."""
    settings = config.ppo if isinstance(config, PPORun) else config.train
    mine = math.ceil(batch / facts.ranks)
    return min(mine, settings.micro_batch_size or mine)


def _written(config: Run) -> tuple[int, int]:
    """Tokens of the longest prompt and answer of the data."""
    return config.dataset.max_prompt_tokens, config.dataset.max_response_tokens


def _training(
    model: Architecture, forward: Forward, batch: Batch, role: str = "policy", logits: float = 0.0
) -> Iterator[Item]:
    """Activations of a micro-batch, what the loss needs beside them, and then the backward."""
    yield Item(role, KEPT, activations.kept(model, forward, batch.rows, batch.length), TRAIN)
    yield Item(role, LOGITS, logits, (FORWARD,))
    yield Item(role, PASSING, activations.backward(model, forward.width, batch.tokens), (BACKWARD,))


def _sft(config: SFTRun, facts: Facts) -> Iterator[Item]:
    model, forward = facts.model, forward_of(config, facts, padded=True)
    if not config.lora.full:
        yield from _trained("policy", _numbers(config, facts), config)
    batch = Batch(micro_rows(config, facts, config.train.batch_size), *_written(config))
    yield from _training(model, forward, batch, logits=trl_logits(facts, batch))


def trl_logits(facts: Facts, batch: Batch) -> float:
    """TRL's fused head, by tiles: of all positions in torch's operations, or of the answers' in a Triton kernel."""
    model = facts.model
    positions = batch.rows * batch.answer if facts.device == "cuda" else batch.rows * (batch.length - 1)
    tile = min(positions, TILE[0]) * min(model.vocabulary, TILE[1])
    gradient = positions * model.hidden * FLOAT  # of the hidden states, summed over the tiles
    if facts.device == "cuda":
        return tile * facts.width + gradient
    return tile * (FLOAT * TRL_ARRAYS - (FLOAT - facts.width)) + gradient


def our_logits(facts: Facts, positions: int) -> float:
    """A chunk of logits and what is made of it (algorithms/logprob.py), and the gradient of the hidden states."""
    budget = CHUNK * (GPU if facts.device == "cuda" else 1)
    chunk = min(positions * facts.model.vocabulary, max(budget, facts.model.vocabulary))
    return chunk * FLOAT * OUR_ARRAYS + positions * facts.model.hidden * facts.width


def whole_logits(facts: Facts, positions: int) -> float:
    """What the same would take without chunks: logits, their softmax and its gradient, of all positions at once."""
    return positions * facts.model.vocabulary * FLOAT * OUR_ARRAYS


def _reward(config: RewardRun, facts: Facts) -> Iterator[Item]:
    model, reward = facts.model, config.reward
    forward = forward_of(config, facts)
    yield from _trained("reward", _numbers(config, facts) + model.hidden + 1, config)
    prompt, answer = _written(config)
    pairs = micro_rows(config, facts, config.train.batch_size)
    pair = prompt + 2 * answer
    if reward.micro_batch_tokens:
        pairs = max(1, min(pairs, reward.micro_batch_tokens // pair))
    compared = answer if reward.loss == "token_wise" else 1
    heads = 2 * pairs * compared * model.hidden * (facts.width + FLOAT)
    if reward.share_prompts:
        kept = activations.kept_pairs(model, forward, pairs, prompt, answer, answer)
        tokens = pairs * pair
    else:
        tokens = 2 * pairs * (prompt + answer)
        kept = activations.kept(model, forward, 2 * pairs, prompt + answer)
    yield Item("reward", KEPT, kept + heads, TRAIN)
    yield Item("reward", PASSING, activations.backward(model, forward.width, tokens), (BACKWARD,))


def _direct(config: DPORun | KTORun, facts: Facts) -> Iterator[Item]:
    adapter = _numbers(config, facts)
    yield from _trained("policy", adapter, config)
    if facts.reference:
        yield _frozen("ref", adapter)
    rows = 2 * micro_rows(config, facts, config.train.batch_size)
    batch = Batch(rows, *_written(config))
    forward = forward_of(config, facts, padded=True, train=False)
    yield from _training(facts.model, forward, batch, logits=trl_logits(facts, batch))


def _ilql(config: ILQLRun, facts: Facts) -> Iterator[Item]:
    model, adapter = facts.model, _numbers(config, facts)
    yield from _trained("policy", adapter, config)
    q_head = shapes.q_head(config.ilql.head, model.hidden, model.vocabulary)
    value = 2 * model.hidden * model.hidden if config.ilql.head != "linear" else model.hidden
    yield from _trained("Q and V heads", 2 * q_head + value, config)
    yield _frozen("lagging Q heads", 2 * q_head)
    for role in facts.scorers:
        yield _frozen(role, adapter)
    rows = micro_rows(config, facts, config.train.batch_size)
    batch = Batch(rows, *_written(config))
    forward = forward_of(config, facts, train=False)
    positions = rows * batch.answer
    features = 3 * positions * model.hidden * FLOAT * (3 if config.ilql.head != "linear" else 1)
    # of a chunk's Q, and the gradient of a head's weight before it is added
    q = our_logits(facts, positions) + q_head * FLOAT
    kept = activations.kept(model, forward, rows, batch.length) + features
    yield Item("policy", KEPT, kept, TRAIN)
    yield Item("Q and V heads", LOGITS, q, TRAIN)
    yield Item("policy", PASSING, activations.backward(model, forward.width, batch.tokens), (BACKWARD,))


def _rft(config: RFTRun, facts: Facts) -> Iterator[Item]:
    adapter, model = _numbers(config, facts), facts.model
    yield from _trained("policy", adapter, config)
    for role in facts.scorers:
        yield _frozen(role, adapter)
    asked, answer = config.dataset.max_prompt_tokens, config.generation.max_new_tokens
    rows = math.ceil(EVAL_ROWS / facts.ranks)
    yield from _rollout(config, facts, Batch(rows, asked, answer))
    batch = Batch(micro_rows(config, facts, config.train.batch_size), asked, answer)
    logits = our_logits(facts, batch.rows * answer)
    yield from _training(model, forward_of(config, facts, train=False), batch, logits=logits)


def _scoring(config: Run, facts: Facts, batch: Batch) -> Item:
    passing = activations.passing(facts.model, facts.width, batch.tokens)
    return Item("reward", PASSING, passing, (SCORE,), label="forward")


def _rollout(config: Any, facts: Facts, batch: Batch) -> Iterator[Item]:
    """The cache as far as it has grown, the prompts' forward, and a step's logits for all rows."""
    model, width = facts.model, facts.width
    yield Item("policy", CACHE, cache(model, width, batch, 1), (PREFILL,))
    prefill = activations.passing(model, width, batch.rows * batch.prompt)
    yield Item("policy", PASSING, prefill, (PREFILL,), label="forward of the prompts")
    yield Item("policy", CACHE, cache(model, width, batch, batch.answer), (DECODE,))
    # raw and processed logits, their softmax, and that in float64 with its sums (rollout/sampler.py)
    step = batch.rows * model.vocabulary * (width + 2 * FLOAT + 16)
    yield Item("policy", LOGITS, step, (DECODE,), label="of a step")


def cache(model: Architecture, width: int, batch: Batch, steps: int) -> float:
    """Bytes of keys and values after `steps` tokens, with the room that is taken in advance (rollout/cache.py)."""
    held = batch.prompt + ROOM
    while held < batch.prompt + steps - 1:
        held += 1 + ROOM
    plain = (model.layers - model.windowed) * held
    windowed = model.windowed * min(held, model.window or held)
    return 2.0 * batch.rows * (plain + windowed) * model.key * width


def _ppo(config: PPORun, facts: Facts) -> Iterator[Item]:
    ppo, model, adapter = config.ppo, facts.model, _numbers(config, facts)
    yield from _trained("policy", adapter, config)
    if facts.reference:
        yield _frozen("ref", adapter)
    for role in facts.scorers:
        yield _frozen(role, adapter)
    if ppo.ema_decay:
        yield _frozen("ema", adapter)
    critic = ppo.estimator == "gae"
    own = critic and ppo.critic == "own"
    if critic:
        yield from _trained("critic", (adapter if own else 0) + model.hidden + 1, config)
    prompts = math.ceil(ppo.batch_size / facts.ranks)
    whole = Batch(
        prompts * ppo.samples_per_prompt, config.dataset.max_prompt_tokens, config.generation.max_new_tokens
    )
    yield from _rollout(config, facts, whole)
    mine = math.ceil(whole.rows / ppo.minibatches)
    rows = min(mine, ppo.micro_batch_size or mine)
    if ppo.micro_batch_tokens:
        rows = max(1, min(rows, ppo.micro_batch_tokens // whole.length))
    batch = replace(whole, rows=rows)
    if facts.scorers:
        yield _scoring(config, facts, batch)
    forward = forward_of(config, facts, train=False)
    positions = rows * batch.answer
    states = positions * model.hidden
    yield from _training(model, forward, batch, logits=our_logits(facts, positions))
    if critic:  # the head reads in float32
        yield Item("critic", KEPT, states * FLOAT, TRAIN)
    if own:
        kept = activations.kept(model, forward, rows, batch.length)
        yield Item("critic", KEPT, kept, TRAIN)


def _answering(config: EvalRun | PreferRun, facts: Facts) -> Iterator[Item]:
    adapter = _numbers(config, facts)
    yield _frozen("policies", 2 * adapter)  # the one that answers, and the reference
    for role in facts.scorers:
        yield _frozen(role, adapter)
    if facts.judge:
        yield Item("judge", PARAMETERS, facts.judge, label="its own weights")
    batch = Batch(EVAL_ROWS, config.dataset.max_prompt_tokens, config.generation.max_new_tokens)
    yield from _rollout(config, facts, batch)
    yield Item("policy", LOGITS, our_logits(facts, batch.rows * batch.answer), (SCORE,))
    if facts.scorers:
        yield _scoring(config, facts, batch)


def separate(config: Run, facts: Facts) -> Mapping[str, float]:
    """What PPO with four models of their own would hold: role -> bytes of weights, gradients and moments.

    Policy and critic trained in full in float32 with Adam, 16 bytes a number; reference and reward frozen in the
    base's dtype (Yao et al. 2023, DeepSpeed-Chat).
    """
    number = facts.model.parameters
    trained, frozen = number * (2 * FLOAT + MOMENTS["float32"]), number * facts.width
    return {"policy": trained, "critic": trained, "ref": frozen, "reward": frozen}
