"""Scores of the two answers of comparisons: their prompt computed once where the model allows it, else twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.data.collate import right_pad
from rlhf_exp.data.pairs import Packed, Pair, groups, pack
from rlhf_exp.model.base import Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.model.sharing import Unsupported, shared, windows_of, windows_seen

# of the hidden states' size: what may come of another order of the sums (SmolLM2: 1e-6 in float32, 2 % in bfloat16).
# Tokens that are seen or not seen by mistake change most of them by half and more
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
TRIAL = (Pair([1, 5, 3, 7, 2], [4, 6, 9], [8, 1, 4, 2]), Pair([3, 2], [5], [7, 6, 1]))


def hidden_states(roles: Roles, role: str | None, packed: Packed, share: bool) -> Tensor:
    """Hidden states [2b, A, d] of `role` at packed.answers: first of the chosen answers, then of the rejected.

    share: in one row, each prompt once (model/sharing.py);
    otherwise two padded rows a pair. The two agree but for rounding.
    """
    if share:
        with shared(roles.base.model, packed.spans):
            hidden = roles.trunk(role, packed.ids, position_ids=packed.positions)[0]
        return hidden[packed.answers]
    row, rows, before = (
        packed.ids[0].tolist(),
        [],
        [],
    )  # before: tokens of the row that a sequence does not have
    for start, prompt, chosen, _ in packed.spans:
        rows.append(row[start : start + prompt + chosen])
        before.append(start)
    for start, prompt, chosen, rejected in packed.spans:
        middle = start + prompt + chosen
        rows.append(row[start : start + prompt] + row[middle : middle + rejected])
        before.append(start + chosen)
    device = packed.ids.device
    ids, _ = right_pad(rows, roles.base.pad_id)
    places = packed.answers - torch.tensor(before, device=device).unsqueeze(1)
    return roles.trunk(role, ids.to(device))[torch.arange(len(rows), device=device).unsqueeze(1), places]


@torch.no_grad()
def score_pairs(
    roles: Roles,
    role: str | None,
    head: ScalarHead,
    pairs: Sequence[Pair],
    size: int,
    tokens: int = 0,
    share: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, float]]:
    """(score of chosen, score of rejected) of each pair; a forward has at most `size` pairs and `tokens` tokens.

    Several ranks share the pairs; all return all scores. progress: is told after each forward how many pairs are
    scored (of several ranks about as many, by this one's).
    """
    scores: dict[int, tuple[float, float]] = {}
    for rows, counts in distributed.turns(dealt(pairs, tokens, size), roles.base.in_shards):
        packed = pack([pairs[i] for i in rows]).to(roles.base.device)
        found = head(hidden_states(roles, role, packed, share)[:, -1])
        if counts:
            sides = (side.tolist() for side in found.chunk(2))
            scores |= zip(rows, zip(*sides, strict=True), strict=True)
        progress(min(len(scores) * distributed.world_size(), len(pairs)))
    scores = distributed.union(scores)
    return [scores[i] for i in range(len(pairs))]


def dealt(pairs: Sequence[Pair], tokens: int, size: int) -> list[list[int]]:
    """`data.pairs.groups`, on several ranks each rank's own, in turn."""
    if distributed.world_size() == 1:
        return groups(pairs, tokens, size)
    ordered = sorted(range(len(pairs)), key=lambda i: (-pairs[i].tokens, i))

    def grouped(hand: Sequence[int]) -> list[list[int]]:
        return [[hand[i] for i in part] for part in groups([pairs[i] for i in hand], tokens, size)]

    return distributed.shares(ordered, grouped)


@torch.no_grad()
def cannot_share(base: Base) -> str | None:
    """Why prompts cannot be shared on this model, in words; None where a trial gave what separate forwards give.

    An architecture that this attention does not fit either refuses (a soft cap), or computes something else. What so
    short a trial cannot tell, windows and chunks of attention, the config says.
    """
    size = base.model.get_input_embeddings().num_embeddings
    # from all of the vocabulary: the first ids are special tokens, on which models put weight beyond measure
    ids = [Pair(*([(1000 + 7919 * id) % size for id in part] for part in pair)) for pair in TRIAL]
    packed = pack(ids).to(base.device)
    roles = Roles(base)
    try:
        with windows_seen() as windows:
            found = hidden_states(roles, BASE, packed, share=True).float()
    except Unsupported as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"its forward does not take such a row: {type(error).__name__}"
    plain = hidden_states(roles, BASE, packed, share=False).float()
    apart = float((found - plain).norm() / plain.norm())
    if not apart <= TOLERANCE[base.dtype]:
        return f"its hidden states would differ by {apart:.0%}"
    expected = windows_of(base.model.config)
    if expected is None or expected - windows:
        return "its attention has windows or chunks that it does not tell of"
    return None
