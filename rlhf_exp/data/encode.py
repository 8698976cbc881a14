"""Prompts and responses -> token ids.

Prompt and response are tokenised separately and their ids joined (by the caller), in every stage, so that the ids of
a prompt do not depend on its answer. What a tokenizer puts before every text by itself (Llama's BOS) stands before
the prompt: such models have never seen a text without it. EOS is appended to responses by id. An answer that was cut
does not end, so it gets no EOS.

No torch here. The tokenizer is a transformers fast tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_exp.data.post import shorten_post
from rlhf_exp.data.records import Asked, Dialogue
from rlhf_exp.data.templates import Frame, Piece, check_template, frame, response_frame
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Dataset

QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclass
class Cuts:
    """Lengths of what was encoded, before any cut, and how much was cut. Hand one to the encode functions."""

    prompt_tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    prompts_cut: int = 0
    responses_cut: int = 0

    @property
    def prompts(self) -> int:
        return len(self.prompt_tokens)

    @property
    def responses(self) -> int:
        return len(self.response_tokens)

    def __str__(self) -> str:
        lines = []
        for name, lengths, cut in (
            ("prompt", self.prompt_tokens, self.prompts_cut),
            ("response", self.response_tokens, self.responses_cut),
        ):
            if lengths:
                low, middle, high, most = (quantile(lengths, q) for q in QUANTILES)
                lines.append(
                    f"{name} tokens: median {middle}, 90 % in {low}-{high}, longest {most}; "
                    f"{cut} of {len(lengths)} cut"
                )
        return "; ".join(lines)

    def metrics(self) -> dict[str, float]:
        """Flat names for a tracker."""
        found = {"data/prompts_cut": float(self.prompts_cut), "data/responses_cut": float(self.responses_cut)}
        for name, lengths in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            if lengths:
                found |= {
                    f"data/{name}_tokens_p{100 * q:.0f}": float(quantile(lengths, q)) for q in QUANTILES
                }
        return found


def quantile(values: Sequence[int], q: float) -> int:
    """The smallest value that a share `q` of the values does not exceed (the inverse distribution function)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def encode_prompts(
    tokenizer: Any, dataset: Dataset, prompts: Sequence[Asked], cuts: Cuts | None = None
) -> list[list[int]]:
    """Token ids of each prompt, at most `max_prompt_tokens`; a prompt that occurs twice is tokenised once.

    A prompt that is too long loses the oldest exchanges of its dialogue, then some of the last prompt's own text:
    `left` drops tokens from the left, `right` from the right, `tldr` shortens the post (post.py). A system message
    that leaves no room goes too. The template's own text is never cut. Raises InputError if that alone is too long.
    """
    check_template(dataset.template)
    unique = list(dict.fromkeys(prompts))
    first = prefix(tokenizer)
    frames = [frame(dataset.template, asked, tokenizer) for asked in unique]
    encoded = encode_pieces(tokenizer, [f.pieces for f in frames])
    if encoded and encoded[0][: len(first)] == first:  # a chat template writes it by itself
        first = []
    known = {asked: first + ids for asked, ids in zip(unique, encoded, strict=True)}
    lengths = {asked: len(ids) for asked, ids in known.items()}
    too_long = [asked for asked, length in lengths.items() if length > dataset.max_prompt_tokens]
    for asked in too_long:
        known[asked] = first + _cut(tokenizer, dataset, asked, len(first))
    if cuts is not None:
        cuts.prompt_tokens += [lengths[asked] for asked in prompts]
        cuts.prompts_cut += sum(lengths[asked] > dataset.max_prompt_tokens for asked in prompts)
    return [list(known[asked]) for asked in prompts]


def encode_responses(
    tokenizer: Any, dataset: Dataset, responses: Sequence[str], eos: bool = True, cuts: Cuts | None = None
) -> list[list[int]]:
    """Token ids of each response, at most `max_response_tokens` with its EOS; one that was cut has no EOS."""
    check_template(dataset.template)
    end = [tokenizer.eos_token_id] if eos else []
    if None in end:
        raise InputError("the model's tokenizer has no EOS token, so no answer could end")
    before, after = response_frame(dataset.template)
    pieces = [(Piece(before, True), Piece(text, False), Piece(after, True)) for text in responses]
    encoded = [ids + end for ids in encode_pieces(tokenizer, pieces)]
    if cuts is not None:
        cuts.response_tokens += [len(ids) for ids in encoded]
        cuts.responses_cut += sum(len(ids) > dataset.max_response_tokens for ids in encoded)
    return [ids[: dataset.max_response_tokens] for ids in encoded]


def prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text by itself."""
    plain = encode_texts(tokenizer, ["a"])[0]
    ids = tokenizer("a", return_attention_mask=False)["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
    return list(ids[:start])


def encode_texts(tokenizer: Any, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    """Token ids, nothing added; plain: special tokens in the text are spelled out as ordinary text."""
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=plain,
        verbose=False,
    )["input_ids"]


def encode_pieces(tokenizer: Any, rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """Token ids of each row's joined pieces; only the template's own can place special tokens."""
    specials = _special_tokens(tokenizer)
    encoded = encode_texts(tokenizer, ["".join(piece.text for piece in pieces) for pieces in rows])
    for i, pieces in enumerate(rows):
        if _spells(pieces, specials):
            encoded[i] = _encode_apart(tokenizer, pieces)
    return encoded


def _encode_apart(tokenizer: Any, pieces: Iterable[Piece]) -> list[int]:
    return [id for piece in pieces for id in encode_texts(tokenizer, [piece.text], plain=not piece.own)[0]]


def _spells(pieces: Iterable[Piece], specials: Sequence[str]) -> bool:
    return any(token in piece.text for piece in pieces if not piece.own for token in specials)


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _cut(tokenizer: Any, dataset: Dataset, asked: Asked, taken: int) -> list[int]:
    """The ids of a prompt that is too long, cut by the template's rule to what `taken` tokens leave."""
    most = dataset.max_prompt_tokens - taken
    while isinstance(asked, Dialogue) and asked.history:
        asked = replace(asked, history=asked.history[1:])
        ids = encode_pieces(tokenizer, [frame(dataset.template, asked, tokenizer).pieces])[0]
        if len(ids) <= most:
            return ids
    whole = frame(dataset.template, asked, tokenizer)
    if dataset.template.truncate == "tldr":
        shorter = shorten_post(
            whole.prompt,
            most,
            lambda text: len(encode_pieces(tokenizer, [whole._replace(prompt=text).pieces])[0]),
            lambda text: [start for start, _ in _with_offsets(tokenizer, text, plain=True)[1]],
        )
        front, body, back = encode_pieces(tokenizer, [whole._replace(prompt=shorter).pieces])[0], [], []
    else:
        front, body, back = _parts(tokenizer, whole)
    room = most - len(front) - len(back)
    if room < 0 and isinstance(asked, Dialogue):  # its system message is the row's own text
        return _cut(tokenizer, dataset, asked.prompt, taken)
    if room < 0:
        raise InputError(
            f"dataset.max_prompt_tokens={dataset.max_prompt_tokens} leaves no room for the prompt: "
            f"what is never cut takes {dataset.max_prompt_tokens - room} tokens"
        )
    kept = body[len(body) - room :] if dataset.template.truncate == "left" else body[:room]
    return front + kept + back


def _with_offsets(tokenizer: Any, text: str, *, plain: bool = False) -> tuple[list[int], list[Any]]:
    """Token ids, and for each the (start, stop) of the characters it stands for."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=plain,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def _parts(tokenizer: Any, whole: Frame) -> tuple[list[int], list[int], list[int]]:
    """The ids of a framed prompt, told apart by the characters they stand for: frame, prompt, frame."""
    if _spells(whole.pieces, _special_tokens(tokenizer)):
        return (
            _encode_apart(tokenizer, whole.before),
            _encode_apart(tokenizer, [Piece(whole.prompt, False)]),
            _encode_apart(tokenizer, whole.after),
        )
    ids, offsets = _with_offsets(tokenizer, str(whole))
    start = sum(len(piece.text) for piece in whole.before)
    end = start + len(whole.prompt)
    first = sum(stop <= start for _, stop in offsets) if start else 0
    last = len(ids) - (sum(begin >= end for begin, _ in offsets) if len(str(whole)) > end else 0)
    return ids[:first], ids[first:last], ids[last:]
