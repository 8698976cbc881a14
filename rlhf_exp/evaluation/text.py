"""What a set of responses is like, from their tokens and their text alone."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Hashable, Iterator, Sequence

# a response as token ids (best), as other tokens, or as text, which is split at spaces
Row = str | Sequence[Hashable]


def _ngrams(row: Row, n: int) -> Iterator[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    tokens = row.split() if isinstance(row, str) else row
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def distinct_n(rows: Sequence[Row], n: int = 2) -> float:
    """distinct-n (Li et al. 2016): different n-grams in all rows together, divided by all n-grams.

    The paper divides by tokens; divided by n-grams, 1 means that none comes twice, whatever the lengths.
    Near 0: everybody says the same. It falls with the amount of text, so only sets of like size compare. No
    n-grams at all (rows shorter than n): nan.
    """
    grams = [gram for row in rows for gram in _ngrams(row, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(rows: Sequence[Row], n: int = 4) -> float:
    """Share of n-grams that came before in the same row, averaged over rows (seq-rep-n, Welleck et al. 2020).

    A row shorter than n repeats nothing: 0. No rows: nan.
    """
    shares = []
    for row in rows:
        grams = list(_ngrams(row, n))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares) if shares else math.nan


def is_empty(text: str) -> bool:
    """Whether a reader would see nothing: only spaces, line breaks, control or format characters."""
    return all(unicodedata.category(sign)[0] in "ZC" for sign in text)


def empty_rate(texts: Sequence[str]) -> float:
    """Share of texts without a visible character; nan without texts."""
    return sum(map(is_empty, texts)) / len(texts) if texts else math.nan


def measure(
    texts: Sequence[str], tokens: Sequence[Sequence[Hashable]], ended: Sequence[bool]
) -> dict[str, float]:
    """All text metrics of one policy's responses.

    texts: decoded, without special tokens; tokens: their ids, without EOS and padding; ended: whether EOS
    came. `length` and `length_min` count tokens without EOS. Raises ValueError if there is no response, or if
    the three differ in length.
    """
    if not texts or not len(texts) == len(tokens) == len(ended):
        raise ValueError(f"got {len(texts)} texts, {len(tokens)} token lists, {len(ended)} ended")
    lengths = [len(row) for row in tokens]
    return {
        "length": sum(lengths) / len(lengths),
        "length_min": float(min(lengths)),
        "distinct_1": distinct_n(tokens, 1),
        "distinct_2": distinct_n(tokens, 2),
        "distinct_3": distinct_n(tokens, 3),
        "repetition": repetition(tokens),
        "empty_rate": empty_rate(texts),
        "eos_rate": sum(map(bool, ended)) / len(ended),
    }
