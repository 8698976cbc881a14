"""The texts of the probes: what no reader would prefer to a real answer, made of a record and its neighbours.

    make("short", i, records, seed) -> the text, or None where the record gives none

Each is drawn by the seed, the kind and the record's id alone: two reward models are probed with the same texts.
A word is what spaces separate; in Chinese, two characters.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256

from rlhf_exp.data.records import Asked, Comparison
from rlhf_exp.probes import phrases

GRAM = 3  # words of the repeated n-gram
REPEATS = 4  # of it, at least
LONG = 4  # times as many words as the real answer
TRIES = 64  # to draw another prompt
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_HAN}]{{1,2}}|[^\\s{_HAN}]+")
_SENTENCE_END = tuple(".!?…。！？")


def make(
    kind: str, i: int, records: Sequence[Comparison], seed: int = 0, negatives: bool = False
) -> str | None:
    """The probe of record `i`; None where it would be the real answer itself, or there is too little to make it of.

    negatives: from the wordings that synthetic negatives use, which no probe has. Raises KeyError for another kind.
    """
    record = records[i]
    # truncated and unfinished are cut at the same place: only their end differs
    name = "truncated" if kind == "unfinished" else kind
    digest = sha256(f"{name}:{seed}:{int(negatives)}:{record.id}".encode()).digest()
    made = MAKERS[kind](record, records, random.Random(int.from_bytes(digest[:8], "big")), negatives)
    return None if made == record.chosen else made


def words(text: str) -> list[str]:
    """The words of a text; marks stay with the word that they touch, but for those between Chinese characters."""
    return _WORD.findall(text)


def join(parts: Sequence[str]) -> str:
    """Words with a space between two, except beside a wide character (Chinese, its marks)."""
    text = ""
    for part in parts:
        text += part if not text or _wide(text[-1]) or _wide(part[0]) else f" {part}"
    return text


def is_chinese(text: str) -> bool:
    """Whether more than a third of its letters are Chinese characters."""
    letters = [sign for sign in text if sign.isalpha()]
    return 3 * len(re.findall(f"[{_HAN}]", text)) > len(letters)


def _wide(sign: str) -> bool:
    return unicodedata.east_asian_width(sign) in "WF"


def _language(record: Comparison) -> str:
    return "zh" if is_chinese(record.chosen) else "en"


def _last_prompt(prompt: Asked) -> str:
    return prompt if isinstance(prompt, str) else prompt.prompt


# ---------------------------------------------------------------- the kinds

Maker = Callable[[Comparison, Sequence[Comparison], random.Random, bool], str | None]


def _nothing(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str:
    return ""


def _short(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str | None:
    """The first one to three words of the real answer."""
    found, count = words(record.chosen), draw.randint(1, 3)
    return join(found[:count]) if len(found) > count else None


def _repeated(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str | None:
    """Three words of the real answer, again and again until it is as long as that."""
    found = words(record.chosen)
    if len(found) < GRAM:
        return None
    start = draw.randrange(len(found) - GRAM + 1)
    return join(found[start : start + GRAM] * max(REPEATS, -(-len(found) // GRAM)))


def _echo(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str | None:
    """The (last) prompt itself."""
    return _last_prompt(record.prompt).strip() or None


def _shuffled(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str | None:
    """The real answer's words in another order."""
    found = words(record.chosen)
    if len(set(found)) < GRAM:
        return None
    mixed = list(found)
    while mixed == found:
        draw.shuffle(mixed)
    return join(mixed)


def _others(record: Comparison, records: Sequence[Comparison], draw: random.Random) -> Iterator[str]:
    """Some real answers to other prompts, in a drawn order, none twice."""
    seen = {record.chosen}
    for _ in range(TRIES):  # not a shuffle of all: there may be a hundred thousand
        other = records[draw.randrange(len(records))]
        if other.id != record.id and other.chosen not in seen:
            seen.add(other.chosen)
            yield other.chosen


def _other_answer(
    record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool
) -> str | None:
    """What answers another prompt."""
    return next(_others(record, records, draw), None)


def _other_language(
    record: Comparison, records: Sequence[Comparison], draw: random.Random, negatives: bool
) -> str:
    return draw.choice(phrases.half(phrases.OTHER_LANGUAGES[_language(record)], negatives))


def _long(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str | None:
    """The real answer, and answers to other prompts after it."""
    parts, most = [record.chosen], LONG * len(words(record.chosen))
    for other in _others(record, records, draw):
        if sum(len(words(part)) for part in parts) >= most:
            break
        parts.append(other)
    return join(parts) if len(parts) > 1 else None


def _truncated(record: Comparison, records: Sequence[Comparison], draw: random.Random, _: bool) -> str | None:
    """The real answer up to somewhere between its 40th and 70th hundredth, not at the end of a sentence."""
    found = words(record.chosen)
    count = int(len(found) * draw.uniform(0.4, 0.7))
    while count and found[count - 1].endswith(_SENTENCE_END):
        count -= 1
    return join(found[:count]) if count else None


def _thanks(
    record: Comparison, records: Sequence[Comparison], draw: random.Random, negatives: bool
) -> str | None:
    """The real answer, and a sentence of thanks or praise."""
    return join([record.chosen, draw.choice(phrases.half(phrases.THANKS[_language(record)], negatives))])


def _emoji(record: Comparison, records: Sequence[Comparison], draw: random.Random, negatives: bool) -> str:
    signs = phrases.half(phrases.EMOJI, negatives)
    return "".join(draw.choice(signs) for _ in range(draw.randint(8, 16)))


def _refusal(record: Comparison, records: Sequence[Comparison], draw: random.Random, negatives: bool) -> str:
    return draw.choice(phrases.half(phrases.REFUSALS[_language(record)], negatives))


MAKERS: dict[str, Maker] = {
    "empty": _nothing,
    "eos_only": _nothing,  # without what the template writes around an answer (answers.py)
    "short": _short,
    "repeated": _repeated,
    "emoji": _emoji,
    "echo": _echo,
    "shuffled": _shuffled,
    "other_answer": _other_answer,
    "other_language": _other_language,
    "refusal": _refusal,
    "truncated": _truncated,  # the limit came: no EOS
    "unfinished": _truncated,  # EOS in the middle of the sentence
    "long": _long,
    "thanks": _thanks,
}


def respaced(text: str, i: int) -> str:
    """The same answer with other whitespace: a line break at the end, a space in front, or a space twice."""
    variants = (f"{text}\n", f" {text}", text.replace(" ", "  ", 1) if " " in text.strip() else f"{text}\n\n")
    return variants[i % len(variants)]
