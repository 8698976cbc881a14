"""The families of dialogues; the rows are written by hand in the published schemas."""

from __future__ import annotations

import pytest

from rlhf_exp.data import hh_rlhf, hh_rlhf_zh, rlhf_reward, sharegpt_preference
from rlhf_exp.data.records import BadRow, Dialogue, Drop, prompt_id
from rlhf_exp.schema import Dataset

DROP = Dataset(name="x", family="hh_rlhf")
CUT = Dataset(name="x", family="hh_rlhf", early_difference="cut")
PIES = Dialogue("Which pie?", (("Can you bake?", "Yes, I can."),))


def hh(*turns: str) -> str:
    """The turns of Anthropic's form, Human first."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {said}" for i, said in enumerate(turns))


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


def reason(action) -> str:
    with pytest.raises((Drop, BadRow)) as error:
        action()
    return f"{type(error.value).__name__}: {error.value}"


def test_single_turn():
    row = pair(hh("Hi there", "Hello."), hh("Hi there", "Go away."))
    (record,) = hh_rlhf.comparisons(row, DROP)
    assert (record.prompt, record.chosen, record.rejected) == ("Hi there", "Hello.", "Go away.")
    (demonstration,) = hh_rlhf.demonstrations(row, DROP)
    assert (demonstration.prompt, demonstration.response) == ("Hi there", "Hello.")
    (prompt,) = hh_rlhf.prompts(row, DROP)
    assert (prompt.prompt, prompt.reference) == ("Hi there", "Hello.")
    assert record.id == demonstration.id == prompt.id == prompt_id("Hi there")


def test_multi_turn_and_what_is_inside_a_turn():
    apple = "Apple.\n\nIt is Human: everyone likes it.\nAssistant: too"  # no paragraph begins with a mark
    row = pair(
        hh("Can you bake?", "Yes, I can.", "Which pie?", apple), hh(*PIES.history[0], "Which pie?", "No")
    )
    (record,) = hh_rlhf.comparisons(row, DROP)
    assert (record.prompt, record.chosen, record.rejected) == (PIES, apple, "No")
    assert hh_rlhf.demonstrations(row, DROP)[0].prompt == hh_rlhf.prompts(row, DROP)[0].prompt == PIES


EARLY = pair(hh("Can you bake?", "Yes.", "What?", "Pies."), hh("Can you bake?", "No.", "Why?", "No oven."))
LONGER = pair(hh("Can you bake?", "Yes."), hh("Can you bake?", "No.", "Why?", "No oven."))
ASKED_OTHERWISE = pair(
    hh("Can you bake?", "Yes.", "What?", "Pies."), hh("Can you bake?", "Yes.", "How?", "So.")
)
GOES_ON = pair(hh("Can you bake?", "Yes."), hh("Can you bake?", "Yes.", "How?", "So."))


@pytest.mark.parametrize("row", [EARLY, LONGER, ASKED_OTHERWISE, GOES_ON])
def test_pairs_that_differ_early_are_left_out(row):
    assert reason(lambda: hh_rlhf.comparisons(row, DROP)) == "Drop: differs before the last answer"
    assert hh_rlhf.demonstrations(row, DROP) and hh_rlhf.prompts(row, DROP)  # these see the chosen one only


@pytest.mark.parametrize("row", [EARLY, LONGER])
def test_or_cut_where_the_answers_part(row):
    (record,) = hh_rlhf.comparisons(row, CUT)
    assert (record.prompt, record.chosen, record.rejected) == ("Can you bake?", "Yes.", "No.")


@pytest.mark.parametrize("row", [ASKED_OTHERWISE, GOES_ON, pair(hh("a", "b"), hh("c", "d"))])
def test_but_not_where_different_things_were_asked(row):
    assert reason(lambda: hh_rlhf.comparisons(row, CUT)) == "Drop: differs in a human turn"


def test_cut_does_not_touch_pairs_that_differ_at_the_end():
    row = pair(hh(*PIES.history[0], "Which pie?", "A"), hh(*PIES.history[0], "Which pie?", "B"))
    assert hh_rlhf.comparisons(row, CUT) == hh_rlhf.comparisons(row, DROP)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair(hh("a", "b"), hh("a", "b")), "Drop: equal answers"),
        (pair(hh("a", "b"), hh("a", " b \n")), "Drop: equal answers"),
        (pair(hh("a", "b"), hh("a", "")), "Drop: empty answer"),
        (pair(hh("a", ""), hh("a", "b")), "Drop: empty answer"),
        (pair(hh("a", "", "c", "d"), hh("a", "", "c", "e")), "Drop: empty turn"),
        (pair(hh("", "b"), hh("", "c")), "Drop: empty turn"),
        (pair(hh("a") + hh("b", "c"), hh("a") + hh("b", "d")), "Drop: turns do not alternate"),
        (pair("\n\nAssistant: c", "\n\nAssistant: d"), "Drop: turns do not alternate"),
        (pair(hh("a", "b", "c"), hh("a", "b", "d")), "Drop: differs in a human turn"),
        (pair("Hello", hh("a", "b")), "BadRow: field 'chosen' must begin with 'Human:' or 'Assistant:'"),
        (pair(hh("a", "b"), " "), "BadRow: field 'rejected' is empty"),
        ({"chosen": hh("a", "b")}, "BadRow: no field 'rejected' (has: chosen)"),
    ],
)
def test_what_is_no_pair(row, expected):
    assert reason(lambda: hh_rlhf.comparisons(row, DROP)) == expected


def test_no_answer_to_imitate():
    assert reason(lambda: hh_rlhf.demonstrations({"chosen": hh("a", "")}, DROP)) == "Drop: empty answer"
    assert reason(lambda: hh_rlhf.demonstrations({"chosen": hh("a")}, DROP)) == "Drop: no answer at the end"
    (prompt,) = hh_rlhf.prompts({"chosen": hh("a", "")}, DROP)  # a prompt all the same
    assert (prompt.prompt, prompt.reference) == ("a", None)
    assert hh_rlhf.prompts({"chosen": hh("a", "b", "c")}, DROP)[0].prompt == Dialogue("c", (("a", "b"),))


def zh(*said: str) -> list[dict[str, str]]:
    return [{"role": ("human", "assistant")[i % 2], "text": text} for i, text in enumerate(said)]


def test_hh_rlhf_zh():
    *context, chosen = zh("你会烤吗?", " 会的。", "哪种派?", "苹果派 ")
    row = {"context": context, "chosen": chosen, "rejected": chosen | {"text": "不知道"}}
    asked = Dialogue("哪种派?", (("你会烤吗?", "会的。"),))
    (record,) = hh_rlhf_zh.comparisons(row, DROP)
    assert (record.prompt, record.chosen, record.rejected) == (asked, "苹果派", "不知道")
    assert (
        hh_rlhf_zh.demonstrations(row, DROP)[0].response
        == hh_rlhf_zh.prompts(row, DROP)[0].reference
        == "苹果派"
    )
    single = {"context": zh("你好"), "chosen": chosen, "rejected": chosen}
    assert hh_rlhf_zh.prompts(single, DROP)[0].prompt == "你好"
    assert reason(lambda: hh_rlhf_zh.comparisons(single, DROP)) == "Drop: equal answers"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"context": "text"}, "BadRow: field 'context' must be a list, is text"),
        ({"context": ["a"]}, "BadRow: a turn must be an object with 'role' and 'text', is text"),
        (
            {"context": [{"role": "cat", "text": "a"}]},
            "BadRow: field 'role' must be one of human, user, assistant,",
        ),
        ({"chosen": "a"}, "BadRow: a turn must be an object with 'role' and 'text', is text"),
        ({"chosen": {"role": "assistant"}}, "BadRow: no field 'text' (has: role)"),
        ({"chosen": {"role": "assistant", "text": ""}}, "Drop: empty answer"),
        ({"context": []}, "Drop: turns do not alternate"),
        ({"context": zh("a", "b")}, "Drop: turns do not alternate"),
    ],
)
def test_hh_rlhf_zh_rows_that_are_wrong(change, expected):
    *context, chosen = zh("a", "b")
    row = {"context": context, "chosen": chosen, "rejected": chosen | {"text": "c"}} | change
    assert reason(lambda: hh_rlhf_zh.comparisons(row, DROP)).startswith(expected)


def test_rlhf_reward_with_marks():
    prompt = "Human: Can you bake?\n\nAssistant: Yes, I can.\n\nHuman: Which pie?\n\n"
    row = {"prompt": prompt, "chosen": "Assistant: Apple.\n\nHot.", "rejected": "Assistant: No"}
    (record,) = rlhf_reward.comparisons(row, DROP)
    assert (record.prompt, record.chosen, record.rejected) == (PIES, "Apple.\n\nHot.", "No")
    for ending in ("Assistant:", "Assistant: "):  # the input of a model in DeepSpeed-Chat
        assert rlhf_reward.comparisons(row | {"prompt": prompt + ending}, DROP) == [record]
    (single,) = rlhf_reward.prompts(row | {"prompt": "Human: Which pie?\n\n"}, DROP)
    assert (single.prompt, single.reference) == ("Which pie?", "Apple.\n\nHot.")
    (system,) = rlhf_reward.demonstrations(
        row | {"prompt": "Assistant: Be brief.\n\nHuman: Which pie?\n\n"}, DROP
    )
    assert (system.prompt, system.response) == (Dialogue("Which pie?", system="Be brief."), "Apple.\n\nHot.")


def test_rlhf_reward_plain():
    row = {"prompt": "谁是Human: 你?", "chosen": "Assistant: 我", "rejected": "你"}
    (record,) = rlhf_reward.comparisons(row, DROP)  # without marks in the prompt nothing is taken off
    assert (record.prompt, record.chosen, record.rejected) == ("谁是Human: 你?", "Assistant: 我", "你")
    assert reason(lambda: rlhf_reward.comparisons(row | {"rejected": "\n"}, DROP)) == "Drop: empty answer"
    assert (
        reason(lambda: rlhf_reward.comparisons(row | {"prompt": ""}, DROP))
        == "BadRow: field 'prompt' is empty"
    )


def talk(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": said} for who, said in pairs]


def test_sharegpt_preference():
    history = ("human", "Can you bake?"), ("gpt", "Yes, I can."), ("human", "Which pie?")
    answers = {"chosen": {"from": "gpt", "value": "Apple"}, "rejected": {"from": "gpt", "value": "No"}}
    row = {"conversations": talk(*history), **answers}
    (record,) = sharegpt_preference.comparisons(row, DROP)
    assert (record.prompt, record.chosen, record.rejected) == (PIES, "Apple", "No")
    medicalgpt = row | {"chosen": "Apple", "rejected": "No"}  # plain texts
    assert sharegpt_preference.comparisons(medicalgpt, DROP) == [record]
    brief = Dialogue(PIES.prompt, PIES.history, "Be brief.")
    in_turns = row | {"conversations": talk(("system", "Be brief."), *history)}
    for other in (in_turns, row | {"system": "Be brief."}, in_turns | {"system": "Be long."}):
        assert sharegpt_preference.demonstrations(other, DROP)[0].prompt == brief
    assert sharegpt_preference.prompts(row | {"system": None}, DROP)[0].prompt == PIES


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rejected": "Apple"}, "Drop: equal answers"),
        ({"chosen": {"from": "gpt", "value": " "}}, "Drop: empty answer"),
        ({"chosen": {"from": "human", "value": "b"}}, "Drop: differs in a human turn"),
        ({"chosen": 3}, "BadRow: field 'chosen' must be text, is a number"),
        ({"chosen": {"from": "gpt"}}, "BadRow: no field 'value' (has: from)"),
        ({"conversations": talk(("human", "a"), ("gpt", "b"))}, "Drop: turns do not alternate"),
        ({"conversations": talk(("observation", "a"))}, "BadRow: field 'from' must be one of"),
        ({"conversations": talk(("system", "a"))}, "Drop: turns do not alternate"),
        ({"system": 3}, "BadRow: field 'system' must be text, is a number"),
    ],
)
def test_sharegpt_preference_rows_that_are_wrong(change, expected):
    row = {"conversations": talk(("human", "a")), "chosen": "Apple", "rejected": "No"} | change
    assert reason(lambda: sharegpt_preference.comparisons(row, DROP)).startswith(expected)
