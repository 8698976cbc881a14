"""ROUGE (Lin 2004): how much of a reference's wording an answer has, as F1 of precision and recall.

    ROUGE-N   shared n-grams, each counted as often as both have it (section 2)
    ROUGE-L   length of the longest common subsequence of the two whole texts (section 3.1, beta = 1)

The choices are those of Google's `rouge-score` 0.1.2 without stemming, which the published figures for TL;DR were
made with (trlX and summarize_from_feedback_details through `evaluate`): lower case, tokens are runs of a-z and 0-9,
everything else parts them. One thing more: a Chinese or Japanese character or a Hangul syllable is a token by
itself, where `rouge-score` finds none and every Chinese answer scores 0. Accented and other letters part tokens, as
there.

Written here since `rouge-score` was last released in 2022, comes as a source archive only, and needs nltk for a
stemmer that these figures leave out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

# Han with extensions and compatibility forms, kana, Hangul syllables
_TOKEN = re.compile(
    "[a-z0-9]+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003fa1f]"
)


def tokens(text: str) -> list[str]:
    """Words of a-z and 0-9 in lower case, and single characters of East Asian scripts."""
    return _TOKEN.findall(text.lower())


def rouge_n(answer: Sequence[Hashable], reference: Sequence[Hashable], n: int) -> float:
    """F1 of shared n-grams (Lin 2004, eq. 1, with precision beside recall); 0 where a text has none."""
    mine, theirs = (Counter(zip(*(row[i:] for i in range(n)), strict=False)) for row in (answer, reference))
    return _f1((mine & theirs).total(), mine.total(), theirs.total())


def rouge_l(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence (Lin 2004, eq. 2-4, beta = 1); 0 where a text is empty."""
    return _f1(longest_common_subsequence(answer, reference), len(answer), len(reference))


def longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Its length, in len(a) * len(b) steps and one row of memory."""
    row = [0] * (len(b) + 1)  # row[j]: for what was read of a, and b[:j]
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]


def scores(answer: str, reference: str) -> dict[str, float]:
    """rouge1, rouge2 and rougeL of one answer, each between 0 and 1."""
    mine, theirs = tokens(answer), tokens(reference)
    return {
        "rouge1": rouge_n(mine, theirs, 1),
        "rouge2": rouge_n(mine, theirs, 2),
        "rougeL": rouge_l(mine, theirs),
    }


def measure(answers: Sequence[str], references: Sequence[str | None]) -> dict[str, float]:
    """Means over the answers that have a reference; nothing where none has. ValueError if the lengths differ."""
    found = [scores(a, r) for a, r in zip(answers, references, strict=True) if r is not None]
    return {name: sum(row[name] for row in found) / len(found) for name in (found[0] if found else ())}


def _f1(shared: int, mine: int, theirs: int) -> float:
    return 2 * shared / (mine + theirs) if shared else 0.0
