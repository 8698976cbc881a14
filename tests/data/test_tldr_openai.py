"""OpenAI's own schemas of TL;DR; the rows are written by hand in the published form."""

from __future__ import annotations

import pytest

from rlhf_exp.data import tldr_openai
from rlhf_exp.data.encode import encode_prompts
from rlhf_exp.data.records import BadRow, Drop

POST = {"id": "t3_1", "subreddit": "AskReddit", "title": "A title", "post": "one\n\ntwo three\n"}
# openai/summarize-from-feedback: format_str of the TL;DR tasks
PROMPT = "SUBREDDIT: r/AskReddit\n\nTITLE: A title\n\nPOST: one\n\ntwo three\n\nTL;DR:"


def raw(first: str, second: str, choice: object = 1, **info) -> dict:
    return {
        "info": POST | info,
        "summaries": [
            {"text": first, "policy": "sup4", "note": None},
            {"text": second, "policy": "ref", "note": "x"},
        ],
        "choice": choice,
        "worker": "w",
        "batch": "batch9",
        "split": "valid2",
        "extra": {"confidence": 8},
    }


def test_the_same_post_is_the_same_prompt_in_both_files():
    row = POST | {"summary": " a summary"}
    (demonstration,) = tldr_openai.demonstrations(row, None)
    (prompt,) = tldr_openai.prompts(row, None)
    (record,) = tldr_openai.comparisons(raw(" we met and parted", " nothing of this happened"), None)
    assert demonstration.prompt == prompt.prompt == record.prompt == PROMPT
    assert demonstration.id == prompt.id == record.id
    assert demonstration.response == prompt.reference == "a summary"
    assert (record.chosen, record.rejected) == ("nothing of this happened", "we met and parted")


def test_the_choice_says_which_is_chosen():
    (record,) = tldr_openai.comparisons(raw(" we met and parted", " nothing of this happened", 0), None)
    assert record.source == "ref / sup4"  # who wrote them, whichever was chosen
    assert (record.chosen, record.rejected) == ("we met and parted", "nothing of this happened")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (raw("one two three four", " one two three four"), "equal answers"),
        (raw("one two three four", "one two three"), "under 5 words"),
        (raw("one two three four", ""), "under 5 words"),
        (raw("a b c d", "e f g h", post=None, article="News", site="cnn"), "a news article"),
    ],
)
def test_left_out(row, reason):
    with pytest.raises(Drop, match=f"^{reason}$"):
        tldr_openai.comparisons(row, None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (POST, "no field 'info' (has: id, subreddit, title, post)"),
        (raw("a b c d", "e f g h") | {"info": "x"}, "field 'info' must be an object, is text"),
        (raw("a b c d", "e f g h", post=""), "field 'post' is empty"),
        (raw("a b c d", "e f g h", choice=2), "there must be two 'summaries', and 'choice' must be 0 or 1"),
        (
            raw("a b c d", "e f g h", choice=True),
            "there must be two 'summaries', and 'choice' must be 0 or 1",
        ),
        (raw("a b c d", "e f g h", choice=-1), "there must be two 'summaries', and 'choice' must be 0 or 1"),
        (raw("a b c d", "e f g h", choice=[]), "there must be two 'summaries', and 'choice' must be 0 or 1"),
        (raw("a", "b") | {"summaries": []}, "there must be two 'summaries', and 'choice' must be 0 or 1"),
        (raw("a", "b") | {"summaries": ["a", "b"]}, "field 'summaries' must be an object, is text"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(BadRow) as error:
        tldr_openai.comparisons(row, None)
    assert str(error.value) == reason


@pytest.mark.parametrize("kept", ["one", "on"])
def test_the_template_cuts_the_post_between_blank_lines_too(dataset, tokenizer, kept):
    """The post ends at a newline, else at a character; title and ending stay."""
    expected = PROMPT.replace("one\n\ntwo three", kept)
    data = dataset("tldr", "unused", max_prompt_tokens=len(expected))
    assert tokenizer.decode(encode_prompts(tokenizer, data, [PROMPT])[0]) == expected
