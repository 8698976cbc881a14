"""The CarperAI rows as records; the rows are written by hand in the published form."""

from __future__ import annotations

import pytest

from rlhf_exp.data import tldr
from rlhf_exp.data.records import BadRow, Drop

POST = "SUBREDDIT: r/a\nTITLE: t\nPOST: p"
# printf 'SUBREDDIT: r/a\nTITLE: t\nPOST: p\nTL;DR:' | sha256sum; the id is its head without the sign bit
ID = int("79c288a5c895b564", 16) & (2**63 - 1)


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": POST, "chosen": chosen, "rejected": rejected}


def test_demonstration_and_prompt():
    row = {"prompt": f"{POST}\nTL;DR:", "label": " we met and parted."}
    (demonstration,) = tldr.demonstrations(row, None)
    assert (demonstration.id, demonstration.prompt) == (ID, f"{POST}\nTL;DR:")
    assert demonstration.response == "we met and parted."
    (prompt,) = tldr.prompts(row, None)
    assert (prompt.id, prompt.prompt, prompt.reference) == (ID, f"{POST}\nTL;DR:", "we met and parted.")


def test_a_comparison_has_the_prompt_and_id_of_the_demonstration():
    row = pair("TL;DR: we met and then parted.", "TL;DR: nothing at all happened here.")
    (comparison,) = tldr.comparisons(row, None)
    assert (comparison.id, comparison.prompt) == (ID, f"{POST}\nTL;DR:")
    assert comparison.chosen == "we met and then parted."
    assert comparison.rejected == "nothing at all happened here."


@pytest.mark.parametrize("ending", ["", "\n", "\nTL;DR:", "\nTL;DR: ", "\n\nTL;DR:"])
def test_the_ending_of_the_published_prompt_does_not_matter(ending):
    (prompt,) = tldr.prompts({"prompt": POST + ending, "label": "s"}, None)
    assert prompt.prompt == f"{POST}\nTL;DR:" and prompt.id == ID


def test_dropped_by_the_published_recipe():
    with pytest.raises(Drop, match="equal answers"):
        tldr.comparisons(pair("TL;DR: one two three four", "TL;DR: one two three four "), None)
    # trlX counts the words of the field, "TL;DR:" among them: 4 + 1 is enough, 3 + 1 is not
    assert tldr.comparisons(pair("TL;DR: one two three four", "TL;DR: five six seven eight"), None)
    with pytest.raises(Drop, match="under 5 words"):
        tldr.comparisons(pair("TL;DR: one two three four", "TL;DR: one two three"), None)
    with pytest.raises(Drop, match="under 5 words"):
        tldr.comparisons(pair("one two three four", "one two three four five"), None)


@pytest.mark.parametrize(
    ("view", "row", "reason"),
    [
        (tldr.prompts, {"prompt": "TL;DR:", "label": "x"}, "field 'prompt' is empty before 'TL;DR:'"),
        (tldr.demonstrations, {"prompt": POST, "label": "TL;DR: "}, "field 'label' is empty after 'TL;DR:'"),
        (tldr.comparisons, {"prompt": POST, "label": "x"}, "no field 'chosen' (has: prompt, label)"),
    ],
)
def test_bad_rows(view, row, reason):
    with pytest.raises(BadRow) as error:
        view(row, None)
    assert str(error.value) == reason
