"""The samples of the report: a prompt once, the policies' answers side by side, long texts folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.evaluation import outcome
from rlhf_exp.evaluation.markup import Content, Html, tag
from rlhf_exp.evaluation.text import is_empty

MOST_ANSWERS = 5  # columns
LONG = 420  # characters from which a text is folded


def section(evaluation: Mapping[str, Any]) -> Content:
    """The same prompts, a column for each policy."""
    names = outcome.sampled(evaluation, MOST_ANSWERS)
    yield tag("h2", "Samples")
    if not names:
        yield tag("p", "No samples were kept.", cls="note")
        return
    count = len(evaluation["policies"])
    some = f" ({len(names)} of {count} policies)" if len(names) < count else ""
    yield tag("p", f"The same prompts, answered by each policy{some}; not selected.", cls="note")
    for sample in evaluation["samples"]:
        answers = [_answer(name, sample["responses"].get(name)) for name in names]
        yield tag(
            "article",
            tag("div", _text(str(sample["prompt"])), cls="prompt"),
            tag("div", answers, cls="answers"),
            cls="sample",
        )


def _answer(name: str, answer: Mapping[str, Any] | None) -> Html:
    if answer is None:
        return tag("section", tag("h3", name), tag("div", outcome.MISSING, cls="quiet"), cls="answer")
    cut = tag("span", " (cut\u00a0off)", cls="quiet") if answer.get("ended") is False else None
    scores = [
        tag("span", f"{key} ", tag("b", outcome.signed(outcome.write(value, "+.2f"))), cls=key)
        for key in ("gold", "reward")
        if (value := outcome.number(answer, key)) is not None
    ]
    text = _text(str(answer.get("text") or "").strip("\n "), cut)
    return tag("section", tag("h3", name), text, tag("div", scores, cls="scores"), cls="answer")


def _text(text: str, end: Content = None) -> Html:
    """A text of a model or a data set; a long one is folded, and the reader can open it."""
    if is_empty(text):
        return tag("div", tag("span", "(empty)", cls="quiet"), end)
    whole = tag("div", text, end, cls="text", dir="auto")
    if len(text) <= LONG:
        return whole
    excerpt = tag("span", text[: LONG - 120].rstrip() + " … ", cls="text excerpt", dir="auto")
    show = tag("span", f"show all {len(text):,} characters", cls="more when-closed")
    hide = tag("span", "show less", cls="more when-open")
    return tag("div", tag("details", tag("summary", excerpt, show, hide), whole, cls="long"))
