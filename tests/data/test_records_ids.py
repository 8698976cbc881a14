"""Ids and splits: values from the sha256 test vectors and the `sha256sum` command, not from the code."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhf_exp.data.records import BadRow, prompt_id, split_of, text


def test_id_is_the_head_of_sha256_as_int63():
    # FIPS 180-2: sha256("abc") = ba7816bf 8f01cfea ...; without the sign bit 0xba -> 0x3a
    assert prompt_id("abc") == 0x3A7816BF8F01CFEA
    assert 0 <= prompt_id("") < 2**63
    # sha256("é" as UTF-8, c3 a9) = 4a99557e4033c3...
    assert prompt_id("\u00e9") >> 32 == 0x4A99557E


# printf 'split:0' | sha256sum | cut -c1-16, as a share of 2**64
@pytest.mark.parametrize(
    ("id", "head"),
    [
        (0, "241b94e1509faf7f"),
        (1, "e618f4c932b0356c"),
        (2, "009068ccf2e83a9c"),
        (3, "06f1115916114022"),
        (4, "621f594c1091b9f0"),
        (12345, "c6d1409442a6e432"),
    ],
)
def test_split_is_where_the_second_hash_falls(id, head):
    u = int(head, 16) / 2**64
    assert split_of(id, 0.0, u + 1e-9) == "heldout"
    assert split_of(id, 0.0, u - 1e-9) == "train"
    assert split_of(id, u + 1e-9, 0.0) == "validation"
    assert split_of(id, u / 2 + 1e-9, u / 2) == "validation"
    assert split_of(id, u / 2 - 1e-9, u / 2) == "train"


def test_shares_of_many_prompts():
    splits = Counter(split_of(prompt_id(f"prompt {i}"), 0.1, 0.2) for i in range(10_000))
    # four standard deviations of a binomial: 120 and 160
    assert abs(splits["validation"] - 1000) < 120
    assert abs(splits["heldout"] - 2000) < 160
    assert sum(splits.values()) == 10_000


def test_a_change_of_validation_share_moves_no_heldout_prompt():
    ids = [prompt_id(f"prompt {i}") for i in range(1000)]
    before = {id for id in ids if split_of(id, 0.1, 0.1) == "heldout"}
    assert before == {id for id in ids if split_of(id, 0.4, 0.1) == "heldout"}
    assert before < {id for id in ids if split_of(id, 0.1, 0.3) == "heldout"}


def test_split_does_not_follow_the_order_of_ids():
    """`dataset.limit` takes the smallest ids: they have to be spread over the splits."""
    ids = sorted(prompt_id(f"prompt {i}") for i in range(2000))
    heldout = sum(split_of(id, 0.0, 0.5) == "heldout" for id in ids[:1000])
    assert 400 < heldout < 600


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": "x", "prompt": "y"}, "no field 'chosen' (has: label, prompt)"),
        ({}, "no field 'chosen' (has: nothing)"),
        ({"a\nb": 1}, "no field 'chosen' (has: 'a\\nb')"),
        ({str(i): 1 for i in range(9)}, "has: '0', '1', '2', '3', '4', '5', '6', '7', ...)"),
        ({"chosen": None}, "field 'chosen' must be text, is null"),
        ({"chosen": True}, "field 'chosen' must be text, is true/false"),
        ({"chosen": 3}, "field 'chosen' must be text, is a number"),
        ({"chosen": ["x"]}, "field 'chosen' must be text, is a list"),
        ({"chosen": {"role": "x"}}, "field 'chosen' must be text, is an object"),
        ({"chosen": " \n "}, "field 'chosen' is empty"),
        ({"chosen": "a \ud800 b"}, "field 'chosen' holds half a character"),
    ],
)
def test_bad_fields(row, reason):
    with pytest.raises(BadRow) as error:
        text(row, "chosen")
    assert reason in str(error.value)


def test_text_is_stripped_and_keeps_what_is_inside():
    assert text({"chosen": " a\n b \U0001f600\n"}, "chosen") == "a\n b \U0001f600"
