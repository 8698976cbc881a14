"""Text metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from rlhf_exp.evaluation.text import distinct_n, empty_rate, is_empty, measure, repetition


def test_distinct_counts_over_all_rows_together():
    # bigrams: ab bc | ab bd -> three different ones of four
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 1) == 4 / 6


def test_distinct_does_not_join_rows():
    # [2, 3] would be a bigram only across the border
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0
    assert distinct_n([[1, 2], [3, 1], [2, 9]], 2) == 1.0


def test_distinct_of_text_goes_by_words():
    assert distinct_n(["the soup the soup", "the end"], 2) == 3 / 4  # the-soup soup-the the-soup | the-end


def test_distinct_extremes():
    assert distinct_n([[7] * 11], 2) == 1 / 10
    assert math.isnan(distinct_n([[1], []], 2))
    assert math.isnan(distinct_n([], 2))
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        distinct_n([[1, 2]], 0)


def test_repetition_is_within_a_row_and_averaged_over_rows():
    # 1 2 1 2 1: bigrams 12 21 12 21 -> two of four came before; the second row repeats nothing of its own
    assert repetition([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]], 2) == (1 / 2 + 0) / 2
    assert repetition([[1, 2, 3], [1, 2, 3]], 2) == 0


def test_repetition_of_short_rows_is_zero_and_of_none_nan():
    assert repetition([[1, 1, 1], [5] * 8], 4) == (0 + 4 / 5) / 2
    assert math.isnan(repetition([], 4))


@pytest.mark.parametrize(
    "text", ["", " ", "\n\t\r", "\u3000", "\u200b\u200e", "\ufeff", "\x00\x1b", "\u2028"]
)
def test_empty_means_nothing_to_see(text):
    assert is_empty(text)


@pytest.mark.parametrize("text", [".", "a", "汤", " \ufffd", "0", "😀"])
def test_any_visible_character_is_not_empty(text):
    assert not is_empty(text)


def test_empty_rate():
    assert empty_rate(["", "a", "\u200b", "b"]) == 0.5
    assert math.isnan(empty_rate([]))


def test_measure_collects_all():
    found = measure(["a b", " ", "a b a"], [[1, 2], [9], [1, 2, 1]], [True, False, True])
    assert found == {
        "length": 2.0,
        "length_min": 1.0,
        "distinct_1": 3 / 6,  # 1 2 | 9 | 1 2 1
        "distinct_2": 2 / 3,  # 12 | | 12 21
        "distinct_3": 1.0,  # | | 121
        "repetition": 0.0,
        "empty_rate": 1 / 3,
        "eos_rate": 2 / 3,
    }


def test_measure_wants_as_many_of_each_and_at_least_one():
    with pytest.raises(ValueError, match="got 1 texts, 2 token lists, 1 ended"):
        measure(["a"], [[1], [2]], [True])
    with pytest.raises(ValueError, match="got 0 texts"):
        measure([], [], [])
