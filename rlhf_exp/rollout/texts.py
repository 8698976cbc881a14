"""What the configuration says in texts, in terms of a tokenizer: forbidden first tokens and stop texts.

No torch here. The tokenizer is a transformers fast tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Generation

EOS = "eos"  # in begin_suppress_tokens, whatever the model's EOS token looks like
HALF = "\ufffd"  # what decoding puts for the bytes of a character that is not complete
LEAD = (
    4  # tokens decoded before those that can hold a stop text: a cut character or a swallowed space is theirs
)


def check_texts(generation: Generation, tokenizer: Any) -> None:
    """Raise InputError unless every text in `begin_suppress_tokens` is one token, and every stop can be written."""
    problems = []
    for text in generation.begin_suppress_tokens:
        try:
            token_id(tokenizer, text, 0)
        except InputError as error:
            problems += error.problems
    for text in generation.stop:
        # after a letter: some tokenizers change the spaces that a text begins with
        ids = tokenizer.encode(f"a{text}", add_special_tokens=False)
        if text not in _decode(tokenizer, [ids])[0]:
            problems.append(
                f"generation.stop: this model's tokenizer cannot write {text!r}, so no answer would end there"
            )
    if problems:
        raise InputError(problems)


def token_id(tokenizer: Any, text: str, eos_id: int) -> int:
    """The id of a token by its text, or as the vocabulary spells it; `eos` is EOS. InputError if it is none."""
    if text == EOS:
        return eos_id
    found = tokenizer.convert_tokens_to_ids(text)
    if found is not None and (found != tokenizer.unk_token_id or text == tokenizer.unk_token):
        return found
    ids = tokenizer.encode(text, add_special_tokens=False) if text else []
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    pieces = f"; it is {len(ids)} tokens" if len(ids) > 1 else ""
    raise InputError(
        f"generation.begin_suppress_tokens: {text!r} is no token of this model's vocabulary{pieces}: "
        "name single tokens, or eos for EOS"
    )


def forbidden(generation: Generation, tokenizer: Any, eos_id: int) -> dict[int, int]:
    """Token id -> how many first positions it is forbidden at."""
    limits = {eos_id: generation.min_new_tokens}
    for text in generation.begin_suppress_tokens:
        token = token_id(tokenizer, text, eos_id)
        limits[token] = max(limits.get(token, 0), 1)
    return {token: limit for token, limit in limits.items() if limit > 0}


class Stops:
    """Looks for stop texts at the end of answers. Special tokens count as their text ("<|im_end|>")."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        # a token of a stop text holds at least one of its bytes
        self._width = LEAD + max((len(text.encode()) for text in texts), default=0)

    def before(self, answers: Sequence[Sequence[int]]) -> list[int | None]:
        """For each answer that its newest token completes a stop text of: how many tokens come before that text.

        None where it does not. A token that also holds text before the stop is one of those before.
        """
        tails = [answer[-self._width :] for answer in answers]
        found = []
        for answer, tail, text in zip(answers, tails, _decode(self._tokenizer, tails), strict=True):
            kept = self._kept(tail, text) if any(stop in text for stop in self._texts) else None
            found.append(None if kept is None else len(answer) - len(tail) + kept)
        return found

    def _kept(self, tail: Sequence[int], text: str) -> int | None:
        prefixes = _decode(self._tokenizer, [tail[:n] for n in range(len(tail))])
        known = len(prefixes[-1].rstrip(HALF))  # a stop that ends here was seen a token ago
        starts = [text.find(stop, max(0, known - len(stop) + 1)) for stop in self._texts]
        starts = [start for start in starts if start >= 0]
        if not starts:
            return None
        start = min(starts)
        complete = (n for n, prefix in enumerate(prefixes) if prefix[:start] == text[:start])
        return next(complete, len(tail))


def _decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(
        [list(row) for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
