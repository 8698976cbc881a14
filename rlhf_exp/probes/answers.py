"""Probes as token ids, beside the real answers that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rlhf_exp.data.encode import encode_responses
from rlhf_exp.data.records import Comparison
from rlhf_exp.data.tokenised import Tokenised
from rlhf_exp.probes import texts
from rlhf_exp.schema import Dataset

_ALL = 2**30  # tokens: no limit
NO_EOS = ("truncated",)
NOT_CUT = ("thanks", "whitespace")  # nothing of it is left when it is cut


@dataclass(frozen=True)
class Real:
    """A comparison and its token ids; EOS is the last of `chosen`."""

    record: Comparison
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Probe(NamedTuple):
    """row: of the Real it is compared with; ids: of the answer alone, at most max_response_tokens."""

    row: int
    text: str
    ids: list[int]


def reals(records: Sequence[Comparison], rows: Tokenised, eos_id: int) -> list[Real]:
    """The comparisons whose chosen answer is whole: one that the limit cut has no EOS, which would count too."""
    answers = zip(rows.prompts, rows.answers["chosen"], rows.answers["rejected"], strict=True)
    found = (Real(record, *ids) for record, ids in zip(records, answers, strict=True))
    return [real for real in found if real.chosen[-1] == eos_id]


def build(
    tokenizer: Any,
    dataset: Dataset,
    real: Sequence[Real],
    kind: str,
    seed: int,
    rows: Sequence[int] | None = None,
    negatives: bool = False,
) -> list[Probe]:
    """The probes of one kind, one a comparison (of `rows`; None: of all) where it gives one.

    What is longer than max_response_tokens loses its end and has EOS all the same: it is a probe of what it says, not
    of the cut. Those that come to the ids of the real answer are left out.
    """
    records = [each.record for each in real]
    places = range(len(records)) if rows is None else rows
    tried = {i: texts.make(kind, i, records, seed, negatives) for i in places}
    made = {i: text for i, text in tried.items() if text is not None}
    encoded = encode(tokenizer, dataset, kind, list(made.values()))
    return [
        Probe(i, text, ids)
        for (i, text), ids in zip(made.items(), encoded, strict=True)
        if ids is not None and ids != real[i].chosen
    ]


def encode(tokenizer: Any, dataset: Dataset, kind: str, made: Sequence[str]) -> list[list[int] | None]:
    """Ids of each text as an answer of its kind; None where it would be cut and must not be."""
    most, end = dataset.max_response_tokens, [tokenizer.eos_token_id]
    if kind == "eos_only":
        return [end for _ in made]
    whole = encode_responses(tokenizer, replace(dataset, max_response_tokens=_ALL), made, eos=False)
    if kind in NO_EOS:
        return [ids[:most] for ids in whole]
    return [None if kind in NOT_CUT and len(ids) >= most else ids[: most - 1] + end for ids in whole]
