"""The samples of a frontier report: a prompt at a time, the answers of several trials or checkpoints side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_exp.evaluation.comparison import Group
from rlhf_exp.evaluation.markup import Content, Html, clean, tag
from rlhf_exp.evaluation.outcome import spread
from rlhf_exp.evaluation.trials import HELDOUT, TRAINING, Sample, Trial

MOST = 6  # checkpoints of one trial that are shown side by side
BASELINE = "sft"


def sets(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What can be chosen: {"title", "prompts": [{"prompt", "answers": [{"who", "text", ..}]}]}.

    First the last policy of each group on the held-out prompts, with SFT; then each trial's checkpoints, then the
    last batch of each training.
    """
    found = []
    first = [(group.label, group.trials[0]) for group in groups if group.trials[0].samples.get(HELDOUT)]
    if len(first) > 1:
        found.append({"title": "the last policy of each trial", "prompts": _across(first)})
    every = [(group, trial) for group in groups for trial in group.trials]
    for source, words in ((HELDOUT, "checkpoints of"), (TRAINING, "last batch of")):
        for group, trial in every:
            if samples := trial.samples.get(source):
                seed = f", seed {trial.config.get('seed')}" if len(group.trials) > 1 else ""
                found.append({"title": f"{words} {group.label}{seed}", "prompts": _along(trial, samples)})
    return found


def _along(trial: Trial, samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Each prompt with the answers of one trial's policies."""
    samples = list(samples)
    names = spread(list(dict.fromkeys(name for sample in samples for name in sample.answers)), MOST)
    return [
        _prompt(s.prompt, [(name, s.answers[name]) for name in names if name in s.answers]) for s in samples
    ]


def _across(trials: Sequence[tuple[str, Trial]]) -> list[dict[str, Any]]:
    """Each prompt with SFT's answer and those of the trials' last policies; prompts in the order of their coming."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for label, trial in trials:
        on_path = [row.name for row in trial.rows.get(HELDOUT, []) if row.step]
        for sample in trial.samples[HELDOUT]:
            answers = found.setdefault(sample.prompt, [])
            if not answers and BASELINE in sample.answers:
                answers.append((BASELINE, sample.answers[BASELINE]))
            last = next((name for name in reversed(on_path) if name in sample.answers), None)
            if last is not None:
                answers.append((f"{label} ({last})", sample.answers[last]))
    return [_prompt(prompt, answers) for prompt, answers in found.items() if answers]


def _prompt(prompt: str, answers: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {"prompt": prompt, "answers": [{"who": who, **answer} for who, answer in answers]}


def section(groups: Sequence[Group]) -> Content:
    """The pager, and its texts as data that no browser takes for markup."""
    found = sets(groups)
    yield tag("h2", "Samples")
    if not found:
        yield tag("p", "No run kept samples.", cls="note")
        return
    options = [tag("option", entry["title"]) for entry in found]
    controls = tag(
        "div",
        tag("select", options, aria_label="Which samples"),
        tag("button", "← previous", type="button"),
        tag("button", "next →", type="button"),
        tag("span", cls="place", role="status"),
        cls="pager",
    )
    note = "The same prompts, not selected; the arrow keys turn the pages."
    yield tag("div", tag("p", note, cls="note"), controls, tag("div", cls="shown"), id="samples")
    yield tag("script", data(found), type="application/json", id="samples-data")
    yield tag(
        "noscript", tag("p", "To page through the samples, allow this page its own script.", cls="note")
    )


def data(content: Any) -> Html:
    """JSON that stands within <script>: no `<`, so that no text ends the element or opens a comment."""
    text = json.dumps(_cleaned(content), ensure_ascii=False, allow_nan=False)
    return Html(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return value
