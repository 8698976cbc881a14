"""The set of tokens that each position was sampled from, as it travels with a rollout."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp.algorithms.shapes import check_shapes


class Support(NamedTuple):
    """Kept sets of N positions under top-k, top-p or min-p, one after the other (compressed sparse rows).

    ids: int32[nnz], the token ids of position 0, then of position 1, ...; any order within a position.
    counts: int64[N], how many of them belong to each position.

    A dense bool[N, V] of a 512-token answer takes 77 MB at V = 151k; top-k 50 takes 100 kB like this. It is
    recorded from the policy that sampled and shared by the old, new and reference log-probs: renormalised
    on one set (Holtzman et al. 2020, arXiv:1904.09751, eq. 3) they are distributions over the same tokens,
    so the mean ratio is 1 and the KL is finite.
    """

    ids: Tensor
    counts: Tensor

    @classmethod
    def from_mask(cls, allowed: Tensor) -> "Support":
        """The kept sets of `allowed` bool[N, V], ids ascending."""
        check_shapes(allowed=(allowed, "N V"))
        return cls(allowed.nonzero()[:, 1].int(), allowed.sum(dim=1))

    @staticmethod
    def concat(supports: Sequence["Support"]) -> "Support":
        """The positions of all `supports`, in order; ValueError when there is none."""
        if not supports:
            raise ValueError("Support.concat needs at least one support")
        return Support(torch.cat([s.ids for s in supports]), torch.cat([s.counts for s in supports]))

    def to_mask(self, vocab_size: int) -> Tensor:
        """bool[N, vocab_size], True for the tokens of each position."""
        mask = torch.zeros(len(self.counts), vocab_size, dtype=torch.bool, device=self.ids.device)
        mask[self._position_of_id(), self.ids.long()] = True
        return mask

    def rows(self, index: Tensor) -> "Support":
        """The positions `index` int64[M], in that order; a position may be named twice."""
        check_shapes(index=(index, "M"))
        counts = self.counts[index]
        starts = (self.counts.cumsum(0) - self.counts)[index]
        # Each id's old place: where its position started, plus its rank within the position.
        rank = torch.arange(int(counts.sum()), device=self.ids.device)
        rank = rank - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return Support(self.ids[starts.repeat_interleave(counts) + rank], counts)

    def select(self, mask: Tensor) -> "Support":
        """The positions where `mask` bool[N] is True, in order."""
        check_shapes(mask=(mask, "N"), counts=(self.counts, "N"))
        return self.rows(mask.nonzero().flatten())

    def split(self, size: int) -> list["Support"]:
        """Consecutive pieces of `size` positions (the last may be shorter), as `Tensor.split`."""
        pieces = self.counts.split(size)
        lengths = torch.stack([piece.sum() for piece in pieces]).tolist()
        return [Support(*pair) for pair in zip(self.ids.split(lengths), pieces, strict=True)]

    def _position_of_id(self) -> Tensor:
        """int64[nnz]: the position that each id belongs to."""
        positions = torch.arange(len(self.counts), device=self.ids.device).repeat_interleave(self.counts)
        if len(positions) != len(self.ids):
            raise ValueError(f"counts add up to {len(positions)} but the support has {len(self.ids)} ids")
        return positions
