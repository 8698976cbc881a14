"""What the plan counts: bytes of a kind that a role holds in some of a stage's phases; their sums; the largest."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.memory.architecture import Architecture

# kinds
PARAMETERS, GRADIENTS, OPTIMISER = "parameters", "gradients", "optimiser"
KEPT, PASSING, CACHE, LOGITS = "activations", "passing", "KV cache", "logits"
LIBRARIES = "libraries"
# phases
PREFILL, DECODE, SCORE, SECOND = "prefill", "decode", "score", "second model"
FORWARD, BACKWARD, STEP = "loss", "backward", "step"
ORDER = (PREFILL, DECODE, SCORE, SECOND, FORWARD, BACKWARD, STEP)
TRAIN = (FORWARD, BACKWARD)
BYTES = {"bfloat16": 2, "float32": 4}
# what a process takes before it has a model: Python, torch, transformers, TRL and what they compile; measured
# (docs/scale.md). On CUDA that is the host's memory
PROCESS = 0.7e9


@dataclass(frozen=True)
class Item:
    """Bytes of one kind that a role holds in some phases; () are all."""

    role: str
    kind: str
    bytes: float
    phases: tuple[str, ...] = ()
    label: str = ""  # more exactly what it is
    whole: float = 0.0  # bytes of the same if it were not worked through in chunks; 0: it is not

    def there(self, phase: str) -> bool:
        return not self.phases or phase in self.phases


@dataclass(frozen=True)
class Beside:
    """A second model: a judge or an encoder that scores. Bytes of its weights, and of its largest forward."""

    role: str
    weights: float  # 0: it is the base
    forward: float

    def items(self) -> list[Item]:
        weights = Item(self.role, PARAMETERS, self.weights, label="its own weights")
        return [weights, Item(self.role, PASSING, self.forward, (SECOND,), label="forward")]


@dataclass(frozen=True)
class Facts:
    """What a stage's memory depends on besides its config."""

    model: Architecture
    dtype: str  # of the base
    device: str  # cpu or cuda
    targets: tuple[str, ...]
    scorers: tuple[str, ...] = ()  # roles of the reward models it holds, gold and ensemble included
    reference: bool = True  # whether there is an SFT adapter, so that the reference has one
    beside: tuple[Beside, ...] = ()
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


def peak(found: list[Item]) -> tuple[str, float]:
    """The phase that needs most, and what it needs."""
    sums = {phase: sum(i.bytes for i in found if i.there(phase)) for phase in phases(found)}
    return max(sums.items(), key=lambda pair: pair[1])


def phases(found: list[Item]) -> list[str]:
    """In the order in which they come; a stage that has none is one."""
    there = {phase for item in found for phase in item.phases}
    return [phase for phase in ORDER if phase in there] or ["run"]
