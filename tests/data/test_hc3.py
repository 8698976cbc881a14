"""HC3: several answers a question, none at all, two line ends, files without a source."""

from __future__ import annotations

import pytest

from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.errors import InputError
from rlhf_exp.schema import HC3

ELI5 = " Please explain like I'm five."


def row(question: str, human: list, chatgpt: list, **others) -> dict:
    return {"question": question, "human_answers": human, "chatgpt_answers": chatgpt, **others}


ROWS = [
    row(
        "Why is the sky blue ?" + ELI5, ["h1\r\nh1", " ", "h2\rh2"], ["c1"], index=None, source="reddit_eli5"
    ),
    row("What is a fund ?", [None, "h3"], ["c2", "", "c3"], index=None, source="finance"),
    row("Why not ? Explain like I'm five.\n", [], ["c4"], index=None, source="reddit_eli5"),
]


@pytest.mark.parametrize(
    ("answers", "expected", "empty"),
    [
        ("chatgpt", ["c1", "c2", "c3", "c4"], 1),
        ("human", ["h1\nh1", "h2\nh2", "h3"], 2),
        ("both", ["h1\nh1", "h2\nh2", "c1", "h3", "c2", "c3", "c4"], 3),
    ],
)
def test_each_answer_is_a_demonstration(write, dataset, answers, expected, empty):
    data = dataset("hc3", write("all.jsonl", ROWS), hc3=HC3(answers=answers))
    assert [d.response for d in load_view(data, "demonstrations", "train")] == expected
    counted = {"empty answer": empty} | ({"no answer": 1} if answers == "human" else {})
    assert statistics(data, "demonstrations").dropped == counted
    assert statistics(data, "demonstrations").rows == 3


@pytest.mark.parametrize("answers", ["chatgpt", "human", "both"])
def test_the_reference_is_the_first_answer_by_a_person(write, dataset, answers):
    data = dataset("hc3", write("all.jsonl", ROWS), hc3=HC3(answers=answers))
    prompts = load_view(data, "prompts", "train")
    assert [p.reference for p in prompts] == ["h1\nh1", "h3", None]
    assert prompts[2].prompt == "Why not ? Explain like I'm five."


def test_what_follows_the_questions_of_reddit_can_go(write, dataset):
    more = [row("Why so ?\nPLEASE explain like I'm five", ["h"], ["c"]), row(ELI5, ["h"], ["c"])]
    more += [row("You explain like I'm five . Why ?", ["h"], ["c"])]
    data = dataset("hc3", write("all.jsonl", ROWS + more), hc3=HC3(strip_eli5=True))
    questions = [p.prompt for p in load_view(data, "prompts", "train")]
    kept = ["Why is the sky blue ?", "What is a fund ?", "Why not ?", "Why so ?"]
    assert questions == [*kept, "You explain like I'm five . Why ?"]
    assert statistics(data, "prompts").dropped == {"no question": 1}


def test_sources_are_chosen(write, dataset):
    data = dataset("hc3", write("all.jsonl", ROWS), hc3=HC3(sources=["finance"]))
    assert [d.response for d in load_view(data, "demonstrations", "train")] == ["c2", "c3"]
    assert statistics(data, "demonstrations").dropped == {"of another source": 2, "empty answer": 1}


def test_files_of_one_domain_have_no_source(write, dataset):
    path = write("finance.jsonl", [{k: v for k, v in r.items() if k != "source"} for r in ROWS])
    assert len(load_view(dataset("hc3", path), "prompts", "train")) == 3
    with pytest.raises(InputError) as error:
        load_view(dataset("hc3", path, hc3=HC3(sources=["finance"])), "prompts", "train")
    assert error.value.problems[0] == (
        f"{path}:1: no field 'source', by which dataset.hc3.sources chooses: the hub's per-domain files have none; "
        "read all.jsonl, or leave dataset.hc3.sources empty"
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("q", ["h"], "c"), "field 'chatgpt_answers' must be a list, is text"),
        (row("q", ["h"], [3]), "field 'chatgpt_answers' must be text, is a number"),
        (row("q", ["h"], ["\ud800"]), "field 'chatgpt_answers' holds half a character (a lone surrogate)"),
        ({"question": "q"}, "no field 'chatgpt_answers' (has: question)"),
        (row("", [], ["c"]), "field 'question' is empty"),
    ],
)
def test_bad_rows(write, dataset, bad, reason):
    path = write("all.jsonl", [bad])
    with pytest.raises(InputError) as error:
        load_view(dataset("hc3", path), "demonstrations", "train")
    assert error.value.problems[0] == f"{path}:1: {reason}"


def test_a_clone_of_the_hub_is_read_from_all_jsonl(write, dataset, tmp_path, monkeypatch):
    """Named as in the config, found below RLHF_EXP_DATA by the hub's name or by the dataset's."""
    name = "Hello-SimpleAI/HC3-Chinese:all.jsonl"
    write("clone/HC3-Chinese/all.jsonl", ROWS)
    write("clone/HC3-Chinese/finance.jsonl", ROWS[1:2])
    write("own/hc3_zh/train.jsonl", ROWS[:2])
    for folder, rows in (("clone", 3), ("own", 2), ("clone/HC3-Chinese", 3)):
        monkeypatch.setenv("RLHF_EXP_DATA", str(tmp_path / folder))
        place = tmp_path / folder if folder.endswith("Chinese") else name
        assert statistics(dataset("hc3", place, name="hc3_zh"), "prompts").rows == rows


def test_spelt_line_ends_become_lines_on_request(write, dataset):
    place = write("all.jsonl", [row("a\\nb", [], ["c\\r\\nd\\n", "\\n"])])
    kept = load_view(dataset("hc3", place), "demonstrations", "train")
    assert [(d.prompt, d.response) for d in kept] == [("a\\nb", "c\\r\\nd\\n"), ("a\\nb", "\\n")]
    data = dataset("hc3", place, hc3=HC3(newlines=True))
    assert [(d.prompt, d.response) for d in load_view(data, "demonstrations", "train")] == [("a\nb", "c\nd")]
    assert statistics(data, "demonstrations").dropped == {"empty answer": 1}
