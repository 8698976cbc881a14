from __future__ import annotations

import pytest

from rlhf_exp.data import alpaca
from rlhf_exp.data.records import BadRow, Dialogue, Drop

ROW = {"instruction": "Translate.", "input": "Hund", "output": "dog"}


@pytest.mark.parametrize("nothing", [{"input": ""}, {"input": " \n"}, {"input": None}])
def test_the_prompt_is_the_instruction_and_the_input_if_there_is_one(nothing):
    (demonstration,) = alpaca.demonstrations(ROW, None)
    assert (demonstration.prompt, demonstration.response) == ("Translate.\nHund", "dog")
    (prompt,) = alpaca.prompts(ROW | nothing, None)
    assert (prompt.prompt, prompt.reference) == ("Translate.", "dog")
    assert alpaca.prompts({"instruction": "Translate.", "output": "dog"}, None) == [prompt]


def test_system_and_history_make_a_dialogue():
    row = ROW | {"system": "Be brief.", "history": [["Hello", "Hi"], ["Katze", "cat"]]}
    (demonstration,) = alpaca.demonstrations(row, None)
    assert demonstration.prompt == Dialogue(
        "Translate.\nHund", (("Hello", "Hi"), ("Katze", "cat")), "Be brief."
    )
    for nothing in ({"system": "", "history": []}, {"system": None, "history": None}):
        assert alpaca.demonstrations(ROW | nothing, None)[0].prompt == "Translate.\nHund"


def test_an_empty_output_is_no_demonstration_but_a_prompt():
    with pytest.raises(Drop, match="empty answer"):
        alpaca.demonstrations(ROW | {"output": ""}, None)
    assert alpaca.prompts(ROW | {"output": ""}, None)[0].reference is None


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"instruction": ""}, BadRow, "field 'instruction' is empty"),
        ({"input": 3}, BadRow, "field 'input' must be text, is a number"),
        ({"output": None}, BadRow, "field 'output' must be text, is null"),
        ({"history": [["a"]]}, BadRow, "field 'history' must hold pairs"),
        ({"history": "ab"}, BadRow, "field 'history' must be a list, is text"),
        ({"history": [["a", None]]}, BadRow, "field 'history response' must be text, is null"),
        ({"history": [["a", ""]]}, Drop, "empty turn"),
    ],
)
def test_rows_that_are_wrong(change, error, reason):
    with pytest.raises(error) as raised:
        alpaca.demonstrations(ROW | change, None)
    assert str(raised.value).startswith(reason)
