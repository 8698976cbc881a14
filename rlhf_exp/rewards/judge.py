"""A local language model as judge of two answers to a prompt: is it likelier to say A next, or B?

Lee et al. 2023 (RLAIF, section 2.1): the probabilities of the two labels as the next token, after a text that holds
both answers. Models prefer a place (Zheng et al. 2023, MT-Bench, section 3.4): each pair is read in both orders and
the two probabilities averaged; a pair whose winner changes with the order is a tie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.data.encode import encode_pieces, encode_texts, prefix
from rlhf_exp.data.templates import Piece, frame
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Judge as Settings
from rlhf_exp.schema import Model, Template

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_exp.model.base import Base

OWN_BASE = "base"  # judge.model=base: the run's own
HOLDERS = ("prompt", "first", "second")
SPELLINGS = ("{}", " {}", "\n{}")  # a label as a tokenizer may write it after a space, a line break, nothing


class Verdicts(NamedTuple):
    """n comparisons, each read in both orders."""

    orders: Tensor  # float32[n, 2], P(first is better), with the first answer shown first and shown second

    @property
    def p(self) -> Tensor:
        """P(first is better) [n], the mean over both orders."""
        return self.orders.mean(dim=1)

    @property
    def consistent(self) -> Tensor:
        """bool[n], whether the same answer wins in both orders; .5 wins nothing."""
        return ((self.orders > 0.5).all(dim=1)) | ((self.orders < 0.5).all(dim=1))

    @property
    def wins(self) -> Tensor:
        """float32[n]: 1 where the first answer wins in both orders, 0 where the second does, else .5."""
        return ((self.p > 0.5).float() - 0.5) * self.consistent + 0.5


class Judge:
    """A loaded model and what it is asked.

    role: a context manager in which the base computes as the judge; where the base is shared with adapters,
    `lambda: roles.use(None)`. Raises InputError for a template or labels that cannot be (`check`).
    """

    def __init__(
        self, base: Base, settings: Settings, role: Callable[[], AbstractContextManager[Any]] = nullcontext
    ):
        from rlhf_exp.model import shapes

        check_template(settings)
        self.base, self.settings, self.role = base, settings, role
        self.labels = [label_ids(base.tokenizer, label) for label in settings.labels]
        self.pieces = _pieces(base.tokenizer, settings)
        self.most = min(settings.max_tokens, shapes.context_of(base.path) or settings.max_tokens)
        self.cut = 0  # texts that were shortened so far

    def compare(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """P(first[i] is a better answer to prompts[i] than second[i]), in both orders."""
        import torch

        asked = list(zip(prompts, first, second, strict=True))
        texts = [*asked, *((prompt, b, a) for prompt, a, b in asked)]
        unique = list(
            dict.fromkeys(texts)
        )  # two equal answers are read once, so that both orders say the same
        place = {text: i for i, text in enumerate(unique)}
        wins = self._first_wins(self._encode(unique))[[place[text] for text in texts]].reshape(2, len(asked))
        return Verdicts(torch.stack((wins[0], 1 - wins[1]), dim=1))

    def _first_wins(self, rows: list[list[int]]) -> Tensor:
        """P(the answer shown first is better) float32[n] of encoded texts: a softmax over the two labels."""
        import torch

        from rlhf_exp.data.collate import right_pad

        found = torch.empty(len(rows))
        weight, bias = self.base.output_layer
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        with torch.no_grad(), self.role():
            for start in range(0, len(order), self.settings.batch_size):
                places = order[start : start + self.settings.batch_size]
                ids, lengths = right_pad([rows[i] for i in places], self.base.pad_id)
                hidden = self.base.trunk(
                    input_ids=ids.to(self.base.device), use_cache=False
                ).last_hidden_state
                last = hidden[torch.arange(len(places)), lengths - 1].float()
                scores = [
                    (last @ weight[label].float().T + (0 if bias is None else bias[label].float())).logsumexp(
                        1
                    )
                    for label in self.labels
                ]
                found[places] = torch.sigmoid(scores[0] - scores[1]).cpu()
        return found

    def _encode(self, texts: Sequence[tuple[str, str, str]]) -> list[list[int]]:
        """Token ids of the whole texts; what is too long is shortened, the template never."""
        tokenizer = self.base.tokenizer
        start = prefix(tokenizer)
        rows = encode_pieces(tokenizer, [self._filled(text) for text in texts])
        if rows and rows[0][: len(start)] == start:  # a chat template writes it by itself
            start = []
        found = []
        for text, ids in zip(texts, rows, strict=True):
            if len(start) + len(ids) > self.most:
                self.cut += 1
                ids = self._shortened(text, self.most - len(start))
            found.append([*start, *ids])
        return found

    def _filled(self, text: tuple[str, str, str]) -> list[Piece]:
        values = dict(zip(HOLDERS, text, strict=True))
        return [piece if piece.own else Piece(values[piece.text], False) for piece in self.pieces]

    def _shortened(self, text: tuple[str, str, str], most: int) -> list[int]:
        """At most `most` ids: an answer keeps a third, or what a short prompt leaves; the prompt its end."""
        tokenizer = self.base.tokenizer
        prompt, *answers = encode_texts(tokenizer, text, plain=True)
        framed = {part.text: encode_texts(tokenizer, [part.text])[0] for part in self.pieces if part.own}
        room = most - sum(len(framed[part.text]) for part in self.pieces if part.own)
        each = max(room // 3, (room - len(prompt)) // 2)
        answers = [ids[:each] for ids in answers]
        kept = room - sum(map(len, answers))
        values = dict(zip(HOLDERS, (prompt[max(0, len(prompt) - kept) :], *answers), strict=True))
        return [id for part in self.pieces for id in (framed if part.own else values)[part.text]]


def load(settings: Settings, device: str) -> Judge:
    """The judge that `judge.model` names, of its own; not for `base`."""
    from rlhf_exp.model.base import load_base

    return Judge(load_base(_model(settings), device, locate(settings, download=True)), settings)


def locate(settings: Settings, download: bool = False) -> Path | None:
    """The model's folder; None for a hub model that is not on this machine. InputError where there is none."""
    from rlhf_exp.model.base import resolve

    try:
        return resolve(_model(settings), download=download)
    except InputError as error:
        raise InputError([line.replace("model.path", "judge.model") for line in error.problems]) from error


def fingerprint(settings: Settings, base: str) -> str:
    """What stands for the judge in a store key; base: the hash of the run's own base."""
    from rlhf_exp.model.base import content_hash

    if settings.model == OWN_BASE:
        return base
    folder = locate(settings)
    return f"hub:{settings.model}" if folder is None else content_hash(folder)


def check(settings: Settings, own_base: Path | None) -> None:
    """InputError unless it can judge, as far as that is known without weights; own_base: the run's base, if here."""
    from rlhf_exp.model.loading import read_tokenizer

    if not settings.model:
        raise InputError("judge.model is not set: a folder or hub id of a model that can judge, or base")
    check_template(settings)
    folder = own_base if settings.model == OWN_BASE else locate(settings)
    if folder is None:
        return
    tokenizer = read_tokenizer(_model(settings), folder)
    for label in settings.labels:
        label_ids(tokenizer, label)
    taken = sum(
        len(ids) for ids in encode_texts(tokenizer, [p.text for p in _pieces(tokenizer, settings) if p.own])
    )
    if taken + 3 * 8 > settings.max_tokens:
        raise InputError(
            f"judge.max_tokens={settings.max_tokens} leaves no room for prompt and answers: the template alone takes "
            f"{taken} tokens"
        )


def check_template(settings: Settings) -> None:
    """InputError unless the template has each placeholder once, and there are two different labels."""
    problems = [
        f"judge.template must hold {{{holder}}} exactly once, it does {count} times"
        for holder in HOLDERS
        if (count := settings.template.count(f"{{{holder}}}")) != 1
    ]
    if len(settings.labels) != 2 or len(set(settings.labels)) != 2:
        problems.append(f"judge.labels must be two different labels, such as [A,B], got {settings.labels}")
    if problems:
        raise InputError(problems)


def label_ids(tokenizer: Any, label: str) -> list[int]:
    """The tokens that spell a label alone, with or without a space before it. InputError where none does."""
    encoded = encode_texts(tokenizer, [spelling.format(label) for spelling in SPELLINGS])
    found = {ids[-1] for ids in encoded if ids and tokenizer.decode(ids[-1:]).strip() == label}
    if not found or not label.strip():
        raise InputError(
            f"judge.labels: {label!r} is not one token of the judge's tokenizer: choose another, such as A"
        )
    return sorted(found)


def _model(settings: Settings) -> Model:
    return Model(name="judge", path=settings.model)


def _pieces(tokenizer: Any, settings: Settings) -> list[Piece]:
    """The text in pieces: the template's own, and placeholders (own=False, their name as text)."""
    parts = re.split("{(" + "|".join(HOLDERS) + ")}", settings.template)
    pieces = [Piece(part, i % 2 == 0) for i, part in enumerate(parts)]
    if settings.chat == "always" or (settings.chat == "auto" and getattr(tokenizer, "chat_template", None)):
        around = frame(Template(name="chat", chat=True), "", tokenizer)
        pieces = [*around.before, *pieces, *around.after]
    return [piece for piece in pieces if piece.text]
