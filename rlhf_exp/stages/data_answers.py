"""The data's own answers to the prompts of an evaluation: the references, else the demonstrations. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.data.load import fingerprint, load_view, statistics
from rlhf_exp.data.records import Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.schema import EvalRun, Run

REFERENCES, DEMONSTRATIONS = "references", "demonstrations"


@dataclass
class DataAnswers:
    """Answers that stand in the data; a prompt may have several, or none."""

    kind: str  # REFERENCES or DEMONSTRATIONS
    texts: list[str]
    places: list[int]  # of each answer's prompt among those asked about


def prompts_of(config: EvalRun) -> list[Prompt]:
    """The prompts that are answered: those of the smallest ids, which have nothing to do with their place."""
    prompts = load_view(config.dataset, "prompts", "heldout")
    return sorted(prompts, key=lambda prompt: prompt.id)[: config.eval.prompts or None]


def kind_of(config: Run) -> str | None:
    """What the data have to compare with; None: nothing, or it is no evaluation.

    Raises InputError where the demonstrations, which would be it, cannot be read.
    """
    if not isinstance(config, EvalRun):
        return None
    if any(prompt.reference is not None for prompt in prompts_of(config)):
        return REFERENCES
    data = config.dataset
    if data.views.demonstrations is None:
        return None
    try:
        records = statistics(data, DEMONSTRATIONS).records
    except InputError as error:
        hint = "eval scores the demonstrations beside the policies; dataset.views.demonstrations=null leaves them out"
        raise InputError([f"{problem} ({hint})" for problem in error.problems]) from error
    return DEMONSTRATIONS if records[data.evaluate_on] else None


def fingerprints(config: Run) -> dict[str, str]:
    """view -> fingerprint of what is read besides the stage's own views: it belongs to the store key.

    What cannot be read has none: preflight says so, with all else that is wrong.
    """
    try:
        more = kind_of(config) == DEMONSTRATIONS
    except InputError:
        return {}
    return {DEMONSTRATIONS: fingerprint(config.dataset, DEMONSTRATIONS)} if more else {}


def answers_to(prompts: list[Prompt], config: EvalRun) -> DataAnswers | None:
    """The data's answers to these prompts; None where there is not one."""
    kind = kind_of(config)
    if kind == REFERENCES:
        found = [(prompt.reference, i) for i, prompt in enumerate(prompts) if prompt.reference is not None]
    elif kind == DEMONSTRATIONS:
        place = {prompt.id: i for i, prompt in enumerate(prompts)}
        rows = load_view(config.dataset, DEMONSTRATIONS, "heldout")
        found = [(row.response, place[row.id]) for row in rows if row.id in place]
    else:
        return None
    texts, places = ([pair[side] for pair in found] for side in (0, 1))
    return DataAnswers(kind, texts, places) if texts else None
