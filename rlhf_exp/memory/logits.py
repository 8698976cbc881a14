"""Logits: what is held of them at once where a loss is worked out, and what a step of sampling takes."""

from __future__ import annotations

from rlhf_exp.memory.activations import FLOAT
from rlhf_exp.memory.counted import Batch, Facts

CHUNK = 2**22  # LOGIT_BUDGET of algorithms/logits.py; on a GPU GPU_BUDGET times as many
GPU = 8
TILE = (4096, 32768)  # TRL's: positions and tokens of the vocabulary that its fused head works on at once
# float32 arrays of such a tile that are there together: TRL's torch code in its backward (the product, scaled, over
# the temperature, log p, p, the gradient, the targets and two terms of the sum), our own code in the forward
TRL_ARRAYS, OUR_ARRAYS = 8.25, 3.0


def trl_logits(facts: Facts, batch: Batch) -> tuple[float, float]:
    """TRL's fused head, by tiles: of all positions in torch's operations, or of the answers' in a Triton kernel.

    Bytes, and what the same would take without tiles.
    """
    model = facts.model
    positions = batch.rows * batch.answer if facts.device == "cuda" else batch.rows * (batch.length - 1)
    tile = min(positions, TILE[0]) * min(model.vocabulary, TILE[1])
    gradient = positions * model.hidden * FLOAT  # of the hidden states, summed over the tiles
    arrays = facts.width if facts.device == "cuda" else FLOAT * TRL_ARRAYS - (FLOAT - facts.width)
    return tile * arrays + gradient, _whole(facts, positions)


def our_logits(facts: Facts, positions: int) -> tuple[float, float]:
    """A chunk of logits and what is made of it (algorithms/logprob.py), and the gradient of the hidden states.

    Bytes, and what the same would take without chunks.
    """
    budget = CHUNK * (GPU if facts.device == "cuda" else 1)
    chunk = min(positions * facts.model.vocabulary, max(budget, facts.model.vocabulary))
    gradient = positions * facts.model.hidden * facts.width
    return chunk * FLOAT * OUR_ARRAYS + gradient, _whole(facts, positions) + gradient


def _whole(facts: Facts, positions: int) -> float:
    """Logits, their softmax and its gradient, of all positions at once."""
    return positions * facts.model.vocabulary * FLOAT * OUR_ARRAYS
