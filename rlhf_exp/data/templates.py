"""Records -> text -> token ids.

Prompt and response are tokenised separately and their ids joined (by the caller), in every stage, so that
the ids of a prompt do not depend on its answer. No BOS is added, by us or by the tokenizer
(`add_special_tokens=False`); EOS is appended by id. An answer that was cut does not end, so it gets no EOS.
Text of a row that spells a special token ("</s>", "<|im_end|>") stays text: only the template can place
special tokens.

No torch here. The tokenizer is a transformers fast tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Dataset, Template

POST = "\nPOST:"
TAIL = "TL;DR:"


@dataclass
class Cuts:
    """Counts what was encoded and what was cut. Hand one to the encode functions, then print or log it."""

    prompts: int = 0
    prompts_cut: int = 0
    responses: int = 0
    responses_cut: int = 0

    def __str__(self) -> str:
        prompts, responses = (
            f"{self.prompts_cut} of {self.prompts} prompts",
            f"{self.responses_cut} of {self.responses} responses",
        )
        return f"cut: {prompts}, {responses}"

    def metrics(self) -> dict[str, float]:
        return {"data/prompts_cut": float(self.prompts_cut), "data/responses_cut": float(self.responses_cut)}


def check_template(template: Template) -> None:
    """Raise InputError unless each format holds its placeholder exactly once."""
    wrong = [
        f"dataset.template.{name} must hold {{{name}}} exactly once, got {value!r}"
        for name, value in (("prompt", template.prompt), ("response", template.response))
        if value.count(f"{{{name}}}") != 1
    ]
    if wrong:
        raise InputError(wrong)


def render_prompt(template: Template, prompt: str) -> str:
    """The prompt as the model reads it. Braces are ordinary characters but for the one placeholder."""
    return template.prompt.replace("{prompt}", prompt)


def render_response(template: Template, response: str) -> str:
    """The response as the model should write it (the EOS token comes after it)."""
    return template.response.replace("{response}", response)


def encode_prompts(
    tokenizer: Any, dataset: Dataset, prompts: Sequence[str], cuts: Cuts | None = None
) -> list[list[int]]:
    """Token ids of each prompt, at most `max_prompt_tokens`; a prompt that occurs twice is tokenised once.

    The template's own text is never cut; of the row's text, `left` drops tokens from the left, `right` from
    the right, and `tldr` shortens the post (see `_shorten_post`). Raises InputError if the template alone
    is too long.
    """
    check_template(dataset.template)
    frame = tuple(dataset.template.prompt.split("{prompt}"))
    unique = list(dict.fromkeys(prompts))
    known = dict(zip(unique, _encode_framed(tokenizer, frame, unique), strict=True))
    too_long = {prompt for prompt, ids in known.items() if len(ids) > dataset.max_prompt_tokens}
    for prompt in too_long:
        known[prompt] = _cut_prompt(tokenizer, dataset, frame, prompt)
    if cuts is not None:
        cuts.prompts += len(prompts)
        cuts.prompts_cut += sum(prompt in too_long for prompt in prompts)
    return [list(known[prompt]) for prompt in prompts]


def encode_responses(
    tokenizer: Any, dataset: Dataset, responses: Sequence[str], eos: bool = True, cuts: Cuts | None = None
) -> list[list[int]]:
    """Token ids of each response, at most `max_response_tokens` with its EOS; one that was cut has no EOS."""
    check_template(dataset.template)
    end = [tokenizer.eos_token_id] if eos else []
    if None in end:
        raise InputError("the model's tokenizer has no EOS token, so no answer could end")
    encoded = _encode_framed(tokenizer, tuple(dataset.template.response.split("{response}")), responses)
    encoded = [ids + end for ids in encoded]
    if cuts is not None:
        cuts.responses += len(encoded)
        cuts.responses_cut += sum(len(ids) > dataset.max_response_tokens for ids in encoded)
    return [ids[: dataset.max_response_tokens] for ids in encoded]


def encode_prompt(tokenizer: Any, dataset: Dataset, prompt: str, cuts: Cuts | None = None) -> list[int]:
    """`encode_prompts` of one."""
    return encode_prompts(tokenizer, dataset, [prompt], cuts)[0]


def encode_response(
    tokenizer: Any, dataset: Dataset, response: str, eos: bool = True, cuts: Cuts | None = None
) -> list[int]:
    """`encode_responses` of one."""
    return encode_responses(tokenizer, dataset, [response], eos, cuts)[0]


def _encode(tokenizer: Any, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    """Token ids; plain: special tokens in the text are spelled out as ordinary text."""
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


def _encode_framed(tokenizer: Any, frame: tuple[str, ...], bodies: Sequence[str]) -> list[list[int]]:
    """Token ids of before + body + after of each body; only `before` and `after` can place special tokens."""
    before, after = frame
    specials = _special_tokens(tokenizer)
    suspect = [i for i, body in enumerate(bodies) if any(token in body for token in specials)]
    encoded = _encode(tokenizer, [f"{before}{body}{after}" for body in bodies])
    for i in suspect:
        front, body, back = _encode_parts(tokenizer, before, bodies[i], after)
        encoded[i] = front + body + back
    return encoded


def _encode_parts(
    tokenizer: Any, before: str, body: str, after: str
) -> tuple[list[int], list[int], list[int]]:
    return (
        _encode(tokenizer, [before])[0],
        _encode(tokenizer, [body], plain=True)[0],
        _encode(tokenizer, [after])[0],
    )


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _cut_prompt(tokenizer: Any, dataset: Dataset, frame: tuple[str, ...], prompt: str) -> list[int]:
    """The ids of a prompt that is too long, cut by the template's rule."""
    most = dataset.max_prompt_tokens
    if dataset.template.truncate == "tldr":
        shorter = _shorten_post(tokenizer, frame, prompt, most)
        front, body, back = _encode_framed(tokenizer, frame, [shorter])[0], [], []
    else:
        front, body, back = _parts(tokenizer, frame, prompt)
    room = most - len(front) - len(back)
    if room < 0:
        raise InputError(
            f"dataset.max_prompt_tokens={most} leaves no room for the prompt: "
            f"what is never cut takes {most - room} tokens"
        )
    kept = body[len(body) - room :] if dataset.template.truncate == "left" else body[:room]
    return front + kept + back


def _encode_with_offsets(tokenizer: Any, text: str, *, plain: bool = False) -> tuple[list[int], list[Any]]:
    """Token ids, and for each the (start, stop) of the characters it stands for."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=plain,
        verbose=False,
    )
    return encoded["input_ids"], encoded["offset_mapping"]


def _parts(tokenizer: Any, frame: tuple[str, ...], prompt: str) -> tuple[list[int], list[int], list[int]]:
    """The ids of a framed prompt, told apart by the characters they stand for: frame, row's text, frame."""
    before, after = frame
    if any(token in prompt for token in _special_tokens(tokenizer)):
        return _encode_parts(tokenizer, before, prompt, after)
    ids, offsets = _encode_with_offsets(tokenizer, f"{before}{prompt}{after}")
    start, end = len(before), len(before) + len(prompt)
    first = sum(stop <= start for _, stop in offsets) if before else 0
    last = len(ids) - (sum(begin >= end for begin, _ in offsets) if after else 0)
    return ids[:first], ids[first:last], ids[last:]


def _shorten_post(tokenizer: Any, frame: tuple[str, ...], prompt: str, most: int) -> str:
    """The longest part of a TL;DR prompt that fits, by OpenAI's rule: the POST field ends at a newline.

    (openai/summarize-from-feedback, summarize_from_feedback/tasks.py: process_query.) Where the post's first
    line alone is too long they remove characters; we end at a word if there is one, else at a character. The
    fields before the post are cut likewise, but only where they do not fit without any post; the "TL;DR:"
    at the end stays.
    """
    fields = prompt.removesuffix(TAIL).rstrip()
    tail = prompt[len(fields) :]
    starts = [start for start, _ in _encode_with_offsets(tokenizer, frame[0] + prompt, plain=True)[1]]
    room = most - (len(starts) - bisect_left(starts, len(frame[0]) + len(fields)))

    def fits(end: int) -> bool:
        return len(_encode_framed(tokenizer, frame, [fields[:end].rstrip() + tail])[0]) <= most

    def seems_to_fit(end: int) -> bool:  # by the whole prompt's tokens: near, and without encoding again
        return bisect_left(starts, len(frame[0]) + end) <= room

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
