"""Rows and groups of rows, divided among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rlhf_exp.distributed.identity import rank, world_size

T = TypeVar("T")


def shares(rows: Sequence[T], grouped: Callable[[Sequence[T]], list[list[T]]]) -> list[list[T]]:
    """`rows` dealt to the ranks like cards, each rank's in groups: of rank 0, of rank 1, ..., again of rank 0, ...

    All ranks have the same number of groups, the last ones of some may be empty: `mine` are this rank's. One rank has
    `grouped(rows)`.
    """
    hands = [grouped(rows[rank :: world_size()]) for rank in range(world_size())]
    most = max(map(len, hands))
    return [hand[k] if k < len(hand) else [] for k in range(most) for hand in hands]


def mine(groups: Sequence[T]) -> Sequence[T]:
    """Of what was dealt, this rank's."""
    return groups if world_size() == 1 else groups[rank() :: world_size()]


def turns(groups: Sequence[list[int]], all_take_part: bool) -> Iterator[tuple[list[int], bool]]:
    """This rank's groups of rows, each with True; the empty ones are left out.

    all_take_part: a forward needs every rank (ZeRO-3 gathers weights in it). Then the ranks go through the same
    number of groups: in place of an empty one comes another's row with False, to be computed and not counted.
    """
    if world_size() == 1:
        yield from ((rows, True) for rows in groups)
        return
    spare = next((rows for rows in groups if rows), [])[:1]
    own = list(mine(groups)) + [[]] * (-(-len(groups) // world_size()) - len(mine(groups)))
    for rows in own:
        if rows or (all_take_part and spare):
            yield rows or spare, bool(rows)
