"""Records -> the text that a model reads, in pieces: what the template says, and what the row says.

A piece of the row's text that spells a special token ("</s>", "<|im_end|>") stays text: only the template can place
special tokens. No torch here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from rlhf_exp.data.records import Asked, Dialogue
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Template


class Piece(NamedTuple):
    """Some text; `own`: the template's, else a row's."""

    text: str
    own: bool


class Frame(NamedTuple):
    """A prompt as the model reads it: what is around the last thing that was asked, and that."""

    before: tuple[Piece, ...]
    prompt: str
    after: tuple[Piece, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (*self.before, Piece(self.prompt, False), *self.after)

    def __str__(self) -> str:
        return "".join(piece.text for piece in self.pieces)


PLACEHOLDERS = {
    "prompt": ("prompt",),
    "response": ("response",),
    "turn": ("prompt", "response"),
    "system": ("system",),
}


def check_template(template: Template) -> None:
    """Raise InputError unless each format holds each of its placeholders exactly once."""
    wrong = [
        f"dataset.template.{name} must hold {{{holder}}} exactly once, got {getattr(template, name)!r}"
        for name, holders in PLACEHOLDERS.items()
        for holder in holders
        if getattr(template, name).count(f"{{{holder}}}") != 1
    ]
    if wrong:
        raise InputError(wrong)


def response_frame(template: Template) -> tuple[str, str]:
    """What the template puts before and after a response."""
    before, after = template.response.split("{response}")
    return before, after


def frame(template: Template, asked: Asked, tokenizer: Any = None) -> Frame:
    """The prompt in its template. The tokenizer is needed for `chat`, whose template is the tokenizer's own.

    Braces in the row's text are ordinary characters.
    """
    if template.chat:
        return _chat_frame(tokenizer, asked)
    pieces = [Piece(template.preamble, True)]
    if isinstance(asked, Dialogue):
        if asked.system:
            pieces += _fill(template.system, {"system": asked.system})
        for prompt, response in asked.history:
            pieces += _fill(template.turn, {"prompt": prompt, "response": response})
        asked = asked.prompt
    before, after = template.prompt.split("{prompt}")
    return Frame((*pieces, Piece(before, True)), asked, (Piece(after, True),))


def _fill(form: str, values: dict[str, str]) -> list[Piece]:
    """A format with values for its placeholders."""
    parts = re.split("({" + "}|{".join(values) + "})", form)
    return [Piece(values[part[1:-1]], False) if i % 2 else Piece(part, True) for i, part in enumerate(parts)]


def _chat_frame(tokenizer: Any, asked: Asked) -> Frame:
    """The tokenizer's chat template around the row's texts."""
    dialogue = asked if isinstance(asked, Dialogue) else Dialogue(asked)
    texts = [dialogue.system] * bool(dialogue.system)
    texts += [text for exchange in dialogue.history for text in exchange] + [dialogue.prompt]
    template = getattr(tokenizer, "chat_template", None)
    own = _chat_parts(tokenizer, template, bool(dialogue.system), len(dialogue.history))
    pieces = [Piece(own[0], True)]
    for text, part in zip(texts, own[1:], strict=True):
        pieces += [Piece(text, False), Piece(part, True)]
    return Frame(tuple(pieces[:-2]), dialogue.prompt, (pieces[-1],))


@lru_cache(maxsize=256)
def _chat_parts(tokenizer: Any, template: str | None, system: bool, exchanges: int) -> tuple[str, ...]:
    """What a chat template writes before, between and after the messages of a dialogue, up to the answer.

    The messages are marks that no template knows, which are then looked for in what it makes of them. Models that
    can think before they answer (Qwen3) are asked not to: the answers in the data hold no thoughts.
    """
    if not template:
        raise InputError(
            "dataset/template=chat: the model's tokenizer has no chat template; choose another, such as plain"
        )
    roles = ["system"] * system + ["user", "assistant"] * exchanges + ["user"]
    marks = [f"MESSAGE{i}OF{len(roles)}" for i in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # whatever a template in Jinja raises
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"dataset/template=chat: the model's chat template refuses the roles {', '.join(roles)}: {reason}"
        ) from error
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise InputError(
                "dataset/template=chat: the model's chat template does not hold every message once; choose another"
            )
        parts.append(part)
    return (*parts, text)
