"""ROUGE against values worked out by hand and values of the rouge-score package."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from rlhf_exp.evaluation import rouge

CAT, LONGER = "the cat sat on the mat", "the cat lay on the mat near the door"

# answer, reference, ROUGE-1, -2, -L: printed once by rouge-score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"],
# use_stemmer=False), fmeasure
PACKAGE = [
    (CAT, LONGER, 0.666667, 0.461538, 0.666667),
    ("Police killed the gunman.", "police kill the gunman", 0.75, 0.333333, 0.75),
    ("the gunman kill police", "police killed the gunman", 0.75, 0.333333, 0.5),
    (
        "I don't know how to tell my boss that I'm leaving; any advice?",
        "How do I tell my boss I am leaving in two weeks?",
        *(0.518519, 0.16, 0.444444),
    ),
    ("a a a a", "a b a", 0.571429, 0.0, 0.571429),
    ("", "nothing at all", 0.0, 0.0, 0.0),
    ("naïve café", "naive cafe", 0.0, 0.0, 0.0),
    ("one", "one", 1.0, 0.0, 1.0),
    (
        "TL;DR: girlfriend (22f) broke up with me after 3.5 years, what now??",
        "Broke up with 22F girlfriend of 3.5 years. What do I do now?",
        *(0.714286, 0.384615, 0.571429),
    ),
]


def test_by_hand():
    # 6 and 9 words share the, the, cat, on, mat; 5 and 8 pairs share "the cat", "on the", "the mat"; in order: 5
    assert rouge.scores(CAT, LONGER) == pytest.approx(
        {"rouge1": 2 * 5 / (6 + 9), "rouge2": 2 * 3 / (5 + 8), "rougeL": 2 * 5 / (6 + 9)}
    )


@pytest.mark.parametrize(("answer", "reference", "one", "two", "longest"), PACKAGE)
def test_as_the_package_counts(answer, reference, one, two, longest):
    expected = {"rouge1": one, "rouge2": two, "rougeL": longest}
    assert rouge.scores(answer, reference) == pytest.approx(expected, abs=1e-6)


def test_chinese_goes_by_characters():
    assert rouge.tokens("我用GPT-4写了3行代码！") == [*"我用", "gpt", "4", *"写了", "3", *"行代码"]
    # 我很好 and 我不好: of 3 and 3 characters 2 are shared, no pair is, 我..好 is in order
    assert rouge.scores("我很好。", "我不好") == pytest.approx(
        {"rouge1": 2 / 3, "rouge2": 0, "rougeL": 2 / 3}
    )
    assert rouge.tokens("カタカナ 한국") == [*"カタカナ", *"한국"]


def test_an_n_gram_counts_as_often_as_both_have_it():
    assert rouge.rouge_n("aaab", "aab", 1) == pytest.approx(2 * 3 / (4 + 3))
    assert rouge.rouge_n("aaab", "aab", 2) == pytest.approx(2 * 2 / (3 + 2))  # aa once, ab once


def test_the_longest_common_subsequence_by_brute_force():
    draw = random.Random(0)
    for _ in range(60):
        a, b = ("".join(draw.choices("abc", k=draw.randint(0, 7))) for _ in range(2))
        parts = {"".join(part) for n in range(len(a) + 1) for part in combinations(a, n)}
        shared = parts & {"".join(part) for n in range(len(b) + 1) for part in combinations(b, n)}
        assert rouge.longest_common_subsequence(a, b) == max(map(len, shared))


def test_a_mean_over_the_answers_with_a_reference():
    found = rouge.measure(["a b", "a", "x"], ["a b", "b", None])
    assert found == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    assert rouge.measure(["a"], [None]) == {}
    with pytest.raises(ValueError, match="zip"):
        rouge.measure(["a"], ["a", "b"])


def test_the_report_shows_it_and_the_narrow_table_does_not():
    from rich.console import Console

    from rlhf_exp.evaluation import outcome, tables

    metrics = {"gold": 0.5, "kl": 0.0, "length": 9.0, "rouge1": 0.4321, "greedy_rougeL": 0.2}
    evaluation = {"policies": [{"name": "sft", "step": 0, "metrics": metrics}], "samples": []}
    found = {metric.key: metric.label for metric in outcome.measured(evaluation["policies"])}
    assert found.items() >= {"rouge1": "ROUGE-1", "greedy_rougeL": "Greedy ROUGE-L"}.items()
    console = Console(width=78, record=True, quiet=True)
    console.print(tables.summary_table(evaluation))
    assert "0.432" not in console.export_text()
