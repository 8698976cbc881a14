"""OpenAI's rule for a TL;DR prompt that is too long: the POST field ends at an earlier newline.

(openai/summarize-from-feedback, summarize_from_feedback/tasks.py: process_query.)
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

POST = "\nPOST:"
TAIL = "TL;DR:"


def shorten_post(
    prompt: str, most: int, length: Callable[[str], int], starts_of: Callable[[str], list[int]]
) -> str:
    """The longest part of a TL;DR prompt that fits into `most` tokens.

    length: tokens of a prompt with the template around it. starts_of: where the tokens of a text start. Where the
    post's first line alone is too long OpenAI removes characters; we end at a word if there is one, else at a
    character. The fields before the post are cut likewise, but only where they do not fit without any post; the
    "TL;DR:" at the end stays.
    """
    fields = prompt.removesuffix(TAIL).rstrip()
    tail = prompt[len(fields) :]
    starts = starts_of(prompt)
    around = length(prompt) - len(starts)  # the template's tokens, about
    room = most - around - (len(starts) - bisect_left(starts, len(fields)))

    def fits(end: int) -> bool:
        return length(fields[:end].rstrip() + tail) <= most

    def seems_to_fit(end: int) -> bool:  # by the whole prompt's tokens: near, and without encoding again
        return bisect_left(starts, end) <= room

    post = fields.find(POST) + len(POST) if POST in fields else 0
    newline, word, character = r"\n", r"\s+", r"(?s)."
    for begin, end, patterns in (
        (post, len(fields), (newline, word, character)),
        (0, post, (word, character)),
    ):
        for pattern in patterns:
            places = [match.start() for match in re.compile(pattern).finditer(fields, begin, end)]
            places = [place for place in places if fields[begin:place].strip()]
            i = bisect_left(places, True, key=lambda place: not seems_to_fit(place))
            while i < len(places) and fits(places[i]):
                i += 1
            while i > 0 and not fits(places[i - 1]):
                i -= 1
            if i > 0:
                return fields[: places[i - 1]].rstrip() + tail
        if post and fits(post):
            return fields[:post] + tail
    return tail.lstrip()
