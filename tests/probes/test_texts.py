"""The probes' texts: each kind by hand, in English and Chinese; drawn by seed and record alone."""

from __future__ import annotations

import collections
import random
from hashlib import sha256

import pytest

from rlhf_exp.data.records import Comparison, Dialogue
from rlhf_exp.probes import phrases, texts
from rlhf_exp.schema import PROBES

EN = "Boil the rice for ten minutes. Then let it rest under a lid."
ZH = "推荐你去杭州西湖旅游，风景很美。"
RECORDS = [
    Comparison(1, "How do I cook rice?", EN, "No idea."),
    Comparison(2, "周末去哪里玩？", ZH, "不知道。"),
    Comparison(3, "Name a colour.", "Blue is one.", "Seven."),
    Comparison(
        1, "How do I cook rice?", "Use a cooker and wait.", "Rice?"
    ),  # another pair of the first prompt
]


def test_there_is_a_maker_for_every_probe_of_the_schema():
    assert tuple(texts.MAKERS) == PROBES


def test_words():
    assert texts.words("It's  red,\nsays she.") == ["It's", "red,", "says", "she."]
    assert texts.words(ZH) == ["推荐", "你去", "杭州", "西湖", "旅游", "，", "风景", "很美", "。"]
    assert texts.words("用Python写代码") == ["用", "Python", "写代", "码"]
    assert texts.words("  ") == []


def test_joined_words_are_the_text_again():
    for text in (EN, ZH, "用Python写代码"):
        assert texts.join(texts.words(text)) == text
    assert texts.join(["red", "，", "it"]) == "red，it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(ZH, True), (EN, False), ("", False), ("AB推", False), ("A推", True), ("12 ??", False)],
)
def test_chinese_is_a_third_of_the_letters(text, expected):
    """AB推: one of three letters is not more than a third; A推: one of two is."""
    assert texts.is_chinese(text) is expected


@pytest.mark.parametrize("kind", ["empty", "eos_only"])
def test_nothing(kind):
    assert texts.make(kind, 0, RECORDS) == ""
    assert texts.make(kind, 0, [Comparison(1, "p", "", "r")]) is None  # that is the real answer


def test_short_is_the_first_one_to_three_words():
    found = {texts.make("short", 0, RECORDS, seed) for seed in range(40)}
    assert found == {"Boil", "Boil the", "Boil the rice"}
    found = {texts.make("short", 1, RECORDS, seed) for seed in range(40)}
    assert found == {"推荐", "推荐你去", "推荐你去杭州"}
    # "Blue is one." has three words: all three would be the answer itself
    assert {texts.make("short", 2, RECORDS, seed) for seed in range(40)} == {"Blue", "Blue is", None}


def test_repeated_is_three_words_of_it_until_it_is_as_long():
    """13 words: 3 words five times. 3 words: at least four times."""
    grams = {" ".join(EN.split()[i : i + 3]) for i in range(11)}
    found = {texts.make("repeated", 0, RECORDS, seed) for seed in range(80)}
    assert found == {" ".join([gram] * 5) for gram in grams}
    assert texts.make("repeated", 2, RECORDS) == " ".join(["Blue is one."] * 4)
    assert texts.make("repeated", 0, [Comparison(1, "p", "Two words", "r")]) is None
    assert texts.make("repeated", 1, RECORDS) in {
        "".join(texts.words(ZH)[i : i + 3]) * 4 for i in range(7)
    }  # 9 words


def test_echo_is_the_last_prompt():
    assert texts.make("echo", 0, RECORDS) == "How do I cook rice?"
    dialogue = Dialogue("And noodles?", (("How do I cook rice?", EN),), "Be kind.")
    assert texts.make("echo", 0, [Comparison(9, dialogue, "Shorter.", "No.")]) == "And noodles?"


def test_shuffled_has_the_same_words_in_another_order():
    for i, text in ((0, EN), (1, ZH)):
        for seed in range(20):
            found = texts.make("shuffled", i, RECORDS, seed)
            assert found != text
            assert collections.Counter(found.replace(" ", "")) == collections.Counter(text.replace(" ", ""))
    found = {texts.make("shuffled", 2, RECORDS, seed) for seed in range(60)}
    assert found == {
        *("Blue one. is", "is Blue one.", "is one. Blue", "one. Blue is", "one. is Blue"),
    }
    assert (
        texts.make("shuffled", 0, [Comparison(1, "p", "yes yes yes no", "r")]) is None
    )  # nothing to shuffle


def test_other_answer_is_of_another_prompt():
    found = {texts.make("other_answer", 0, RECORDS, seed) for seed in range(20)}
    assert found == {ZH, "Blue is one."}  # not the other answer to the same prompt
    assert texts.make("other_answer", 0, RECORDS[:1]) is None


def test_long_goes_on_with_other_answers_until_four_times_as_long():
    """Blue is one.: 3 words, so 12 are wanted; EN has 13, the cooker's 5, ZH 9."""
    found = {texts.make("long", 2, RECORDS, seed) for seed in range(60)}
    cooker = "Use a cooker and wait."
    assert found == {
        f"Blue is one. {EN}",
        f"Blue is one. {cooker} {EN}",
        f"Blue is one. {cooker}{ZH}",
        f"Blue is one.{ZH}",
    }
    assert texts.make("long", 0, RECORDS[2:3]) is None


def test_truncated_ends_in_mid_sentence_and_unfinished_at_the_same_place():
    """13 words, cut after 5 (0.4 * 13 = 5.2) to 9 of them (0.7 * 13 = 9.1), but not after `minutes.`, the sixth."""
    counts = set()
    for seed in range(400):
        found = texts.make("truncated", 0, RECORDS, seed)
        assert EN.startswith(found) and not found.endswith((".", "!", "?"))
        assert found == texts.make("unfinished", 0, RECORDS, seed)
        counts.add(len(found.split()))
    assert counts == {5, 7, 8, 9}
    assert texts.make("truncated", 1, RECORDS) in {
        "推荐你去杭州",
        "推荐你去杭州西湖",
        "推荐你去杭州西湖旅游",
        ZH[:11],
    }
    assert texts.make("truncated", 0, [Comparison(1, "p", "One.", "r")]) is None


@pytest.mark.parametrize(("kind", "pool"), [("refusal", phrases.REFUSALS), ("thanks", phrases.THANKS)])
def test_phrases_are_in_the_language_of_the_answer_and_apart_from_those_of_negatives(kind, pool):
    for i, language, answer in ((0, "en", EN), (1, "zh", ZH)):
        before = "" if kind == "refusal" else answer + " " * (language == "en")
        for negatives, expected in ((False, pool[language][0::2]), (True, pool[language][1::2])):
            found = {texts.make(kind, i, RECORDS, seed, negatives) for seed in range(60)}
            assert found == {before + phrase for phrase in expected}


def test_another_language_is_another_one():
    for i, language in ((0, "en"), (1, "zh")):
        pool = phrases.OTHER_LANGUAGES[language]
        found = {texts.make("other_language", i, RECORDS, seed) for seed in range(60)}
        assert found == set(pool[0::2])
        against = {texts.make("other_language", i, RECORDS, seed, True) for seed in range(60)}
        assert against == set(pool[1::2])
    assert not any(texts.is_chinese(text) for text in phrases.OTHER_LANGUAGES["zh"])


def test_emoji():
    for seed in range(20):
        found = texts.make("emoji", 0, RECORDS, seed)
        assert 8 <= len(found) <= 16 and set(found) <= set(phrases.EMOJI[0::2])
        assert set(texts.make("emoji", 0, RECORDS, seed, True)) <= set(phrases.EMOJI[1::2])
    assert len(set(phrases.EMOJI)) == len(phrases.EMOJI)


def test_a_probe_depends_on_seed_kind_and_record_and_not_on_its_place():
    # by the definition: texts that change unnoticed would make old reports and new ones incomparable
    digest, expected = sha256(b"shuffled:0:0:1").digest(), EN.split()
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(expected)
    assert texts.make("shuffled", 0, RECORDS, 0) == " ".join(expected)
    assert texts.make("shuffled", 2, RECORDS, 5) == texts.make("shuffled", 0, [RECORDS[2]], 5)
    assert len({texts.make("shuffled", 0, RECORDS, seed) for seed in range(10)}) > 8
    with pytest.raises(KeyError):
        texts.make("poem", 0, RECORDS)


def test_respaced_is_the_same_answer_with_other_whitespace():
    assert texts.respaced("a b c", 0) == "a b c\n"
    assert texts.respaced("a b c", 1) == " a b c"
    assert texts.respaced("a b c", 2) == "a  b c"
    assert texts.respaced("很美", 2) == "很美\n\n"
    assert texts.respaced("a b c", 3) == "a b c\n"
