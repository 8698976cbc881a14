"""Comparisons as token ids, and how several are laid out in one row: each prompt once, before both of its answers.

    prompt 1 | chosen 1 | rejected 1 | prompt 2 | chosen 2 | rejected 2 | ..

Positions begin again at 0 with each prompt, and at the prompt's length with each answer, so that an answer stands
where it would stand alone. Who may look at whom is model/sharing.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.data.tokenised import Tokenised


class Pair(NamedTuple):
    """Token ids of a prompt and of two answers to it, which are never empty (EOS ends them)."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """With the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


class Span(NamedTuple):
    """Where a pair is in the row: its first token, and the lengths of its parts."""

    start: int
    prompt: int
    chosen: int
    rejected: int


class Packed(NamedTuple):
    """b pairs in one row of T tokens, nothing of it padding; A is the longest answer."""

    ids: Tensor  # int64[1, T]
    positions: Tensor  # int64[1, T]
    spans: tuple[Span, ...]
    # int64[2b, A], first of the chosen, then of the rejected answers: where in the row their tokens are. After an
    # answer's end comes its last token's place: what is read there is what the answer was worth at its end
    answers: Tensor
    lengths: Tensor  # int64[2b], of the answers

    def to(self, device: torch.device) -> Packed:
        return Packed(
            self.ids.to(device),
            self.positions.to(device),
            self.spans,
            self.answers.to(device),
            self.lengths.to(device),
        )


def pairs_of(rows: Tokenised) -> list[Pair]:
    """The pairs of a split of comparisons, in its order."""
    return [
        Pair(*parts)
        for parts in zip(rows.prompts, rows.answers["chosen"], rows.answers["rejected"], strict=True)
    ]


def pack(pairs: Sequence[Pair]) -> Packed:
    """Lay the pairs out in one row. Raises ValueError for an answer without a token."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    for pair in pairs:
        prompt, chosen, rejected = map(len, pair)
        if not (chosen and rejected):
            raise ValueError(f"an answer without a token: lengths {chosen} and {rejected}")
        spans.append(Span(len(ids), prompt, chosen, rejected))
        ids += [*pair.prompt, *pair.chosen, *pair.rejected]
        positions += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
    first = torch.tensor([s.start + s.prompt for s in spans] + [s.start + s.prompt + s.chosen for s in spans])
    lengths = torch.tensor([s.chosen for s in spans] + [s.rejected for s in spans])
    steps = torch.arange(int(lengths.max())).minimum(lengths.unsqueeze(1) - 1)
    return Packed(
        torch.tensor([ids]), torch.tensor([positions]), tuple(spans), first.unsqueeze(1) + steps, lengths
    )


def groups(pairs: Sequence[Pair], tokens: int, most: int) -> list[list[int]]:
    """Indices of pairs in groups of at most `most` pairs and `tokens` tokens, the longest pairs first.

    tokens = 0: no limit of tokens; a pair longer than the limit is a group by itself. Similar lengths come together,
    so that what is padded (models that cannot share prompts) is padded little.
    """
    found: list[list[int]] = []
    room = 0
    for i in sorted(range(len(pairs)), key=lambda i: (-pairs[i].tokens, i)):
        if not found or len(found[-1]) == most or (tokens and pairs[i].tokens > room):
            found.append([])
            room = tokens
        found[-1].append(i)
        room -= pairs[i].tokens
    return found
