"""Family jsonl: any names of fields."""

from __future__ import annotations

import pytest

from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.data.records import Dialogue
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Fields

ROW = {
    "info": {"question": "Which pie?", "by": {"person": "Plum"}},
    "a.b": "Apple",
    "bad": "None",
    "before": [["Can you bake?", "Yes."]],
    "role": "Be brief.",
}
NAMES = Fields("info.question", "a.b", "a.b", "bad", "info.by.person", "role", "before")


def test_fields_may_be_deep_in_objects(write, dataset):
    path = write("rows.jsonl", [ROW])
    data = dataset("jsonl", path, fields=NAMES)
    asked = Dialogue("Which pie?", (("Can you bake?", "Yes."),), "Be brief.")
    (demonstration,) = load_view(data, "demonstrations", "train")
    assert (demonstration.prompt, demonstration.response) == (asked, "Apple")
    (pair,) = load_view(data, "comparisons", "train")
    assert (pair.prompt, pair.chosen, pair.rejected) == (asked, "Apple", "None")
    (prompt,) = load_view(data, "prompts", "train")
    assert (prompt.prompt, prompt.reference) == (asked, "Plum")


def test_the_names_by_default(write, dataset):
    rows = [
        {"prompt": "p", "response": "r", "chosen": "a", "rejected": "b", "system": "not looked at"},
        {"prompt": "q", "response": "r", "chosen": "a", "rejected": "a"},
    ]
    data = dataset("jsonl", write("rows.jsonl", rows))
    assert [(d.prompt, d.response) for d in load_view(data, "demonstrations", "train")] == [
        ("p", "r"),
        ("q", "r"),
    ]
    assert len(load_view(data, "comparisons", "train")) == 1
    assert statistics(data, "comparisons").dropped == {"equal answers": 1}
    assert [p.reference for p in load_view(data, "prompts", "train")] == [None, None]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "info.answer"}, "no field 'info.answer' (has: info, 'a.b', bad, before, role)"),
        ({"prompt": "bad.question"}, "no field 'bad.question' (has: info, 'a.b', bad, before, role)"),
        ({"prompt": "info"}, "field 'info' must be text, is an object"),
        (
            {"prompt": "bad", "response": "nothing"},
            "no field 'nothing' (has: info, 'a.b', bad, before, role)",
        ),
        ({"prompt": "bad", "response": "bad", "history": "role"}, "field 'role' must be a list, is text"),
    ],
)
def test_fields_that_are_not_there(write, dataset, fields, reason):
    path = write("rows.jsonl", [ROW])
    with pytest.raises(InputError) as error:
        load_view(dataset("jsonl", path, fields=Fields(**fields)), "demonstrations", "train")
    assert error.value.problems[0] == f"{path}:1: {reason}"


def test_system_reference_and_history_may_be_absent_in_a_row(write, dataset):
    names = Fields("info.question", system="no.system", history="no.history", reference="info.no")
    (prompt,) = load_view(dataset("jsonl", write("rows.jsonl", [ROW]), fields=names), "prompts", "train")
    assert (prompt.prompt, prompt.reference) == ("Which pie?", None)
