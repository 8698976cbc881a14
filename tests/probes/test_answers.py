"""Probes as ids: EOS, limits, what is left out; and synthetic negatives as rows like any other."""

from __future__ import annotations

import pytest

from rlhf_exp.data.records import Comparison
from rlhf_exp.data.tokenised import Tokenised
from rlhf_exp.probes import answers, negatives, texts
from rlhf_exp.schema import PROBES, Dataset, Reward, Template, Views

LONG = "The soup was warm and the bread was fresh, so we stayed."
RECORDS = [
    Comparison(1, "Dinner?", LONG, "Bad."),
    Comparison(2, "Tea?", "Green tea is nice and cheap.", "No tea."),
    Comparison(3, "Film?", "A slow film with a fine ending.", "Meh."),
    Comparison(4, "Book?", "One.", "Two."),  # of one word: nothing can be cut or shuffled
]


@pytest.fixture
def dataset():
    def make(most: int = 200, response: str = " {response}") -> Dataset:
        return Dataset("toy", "jsonl", Views(), Template(response=response), max_response_tokens=most)

    return make


def ids(base, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenised(base, records, most: int = 200) -> Tokenised:
    sides = {
        side: [([*ids(base, f" {getattr(r, side)}"), base.eos_id])[:most] for r in records]
        for side in ("chosen", "rejected")
    }
    return Tokenised([ids(base, r.prompt) for r in records], sides)


def test_empty_is_the_template_around_nothing_and_eos_only_is_eos(base, dataset):
    encode = answers.encode
    assert encode(base.tokenizer, dataset(), "empty", [""]) == [[*ids(base, " "), base.eos_id]]
    assert encode(base.tokenizer, dataset(), "eos_only", ["", ""]) == [[base.eos_id]] * 2
    assert encode(base.tokenizer, dataset(response="{response}"), "empty", [""]) == [[base.eos_id]]


@pytest.mark.parametrize("kind", PROBES)
def test_all_but_the_truncated_end(base, dataset, kind):
    (found,) = answers.encode(base.tokenizer, dataset(), kind, ["warm and"])
    if kind != "eos_only":
        assert found[: len(ids(base, " warm and"))] == ids(base, " warm and")
    assert (found[-1] == base.eos_id) is (kind != "truncated")
    assert found.count(base.eos_id) == (kind != "truncated")


def test_what_is_too_long_loses_its_end_and_ends_all_the_same(base, dataset):
    whole = ids(base, f" {LONG}")
    encode = answers.encode
    assert len(whole) > 12
    assert encode(base.tokenizer, dataset(10), "echo", [LONG]) == [[*whole[:9], base.eos_id]]
    assert encode(base.tokenizer, dataset(10), "truncated", [LONG]) == [whole[:10]]
    # thanks that nobody sees are none; exactly as long as there is room is not too long
    assert encode(base.tokenizer, dataset(10), "thanks", [LONG]) == [None]
    assert encode(base.tokenizer, dataset(len(whole) + 1), "thanks", [LONG]) == [[*whole, base.eos_id]]
    assert encode(base.tokenizer, dataset(len(whole)), "thanks", [LONG]) == [None]


def test_only_pairs_whose_chosen_answer_is_whole_are_compared(base):
    rows = tokenised(base, RECORDS, 12)
    assert len(rows.answers["chosen"][0]) == 12 and rows.answers["chosen"][0][-1] != base.eos_id
    found = answers.reals(RECORDS, rows, base.eos_id)
    assert [real.record.id for real in found] == [
        r.id for r in RECORDS if len(ids(base, f" {r.chosen}")) < 12
    ]
    assert 1 not in [real.record.id for real in found] and len(found) >= 1
    assert (found[-1].prompt, found[-1].chosen, found[-1].rejected) == (
        *(rows.prompts[3], rows.answers["chosen"][3], rows.answers["rejected"][3]),
    )


def test_a_probe_knows_its_pair_and_what_cannot_be_made_is_left_out(base, dataset):
    real = answers.reals(RECORDS, tokenised(base, RECORDS), base.eos_id)
    found = answers.build(base.tokenizer, dataset(), real, "shuffled", 0)
    assert [probe.row for probe in found] == [0, 1, 2]
    for probe in found:
        assert probe.text == texts.make("shuffled", probe.row, RECORDS, 0)
        assert probe.ids == [*ids(base, f" {probe.text}"), base.eos_id]


def test_a_probe_that_comes_to_the_real_answers_ids_is_left_out(base, dataset):
    """Cut to five tokens and EOS, the answer with others after it is the answer itself."""
    records = [Comparison(1, "p", "A fine film", "r"), RECORDS[1]]
    rows = tokenised(base, records)
    most = len(rows.answers["chosen"][0])
    real = answers.reals(records, rows, base.eos_id)
    assert [p.row for p in answers.build(base.tokenizer, dataset(most), real, "long", 0)] == [1]


# ---------------------------------------------------------------- synthetic negatives


@pytest.mark.parametrize(
    ("share", "kinds", "expected"),
    [
        (0.5, ["empty"], {"empty": 4}),  # as many as real ones
        (0.2, ["empty"], {"empty": 1}),  # 0.25 of 4
        (0.5, ["empty", "refusal", "emoji"], {"empty": 2, "refusal": 1, "emoji": 1}),
        (0.6, ["empty", "shuffled"], {"empty": 3, "shuffled": 3}),
        (0.7, ["shuffled"], {"shuffled": 3}),  # 9 wanted, of three records it can be made
    ],
)
def test_how_many_of_each_kind(base, dataset, share, kinds, expected):
    rows = tokenised(base, RECORDS)
    reward = Reward(negatives=kinds, negatives_share=share)
    records, joined = negatives.added(base.tokenizer, dataset(), RECORDS, rows, reward, 0)
    more = sum(expected.values())
    assert len(records) == len(joined.prompts) == 4 + more
    assert all(len(joined.answers[side]) == 4 + more for side in ("chosen", "rejected"))
    counts = dict.fromkeys(kinds, 0)
    for record in records[4:]:
        i = next(i for i, r in enumerate(RECORDS) if r.id == record.id)
        counts[next(k for k in kinds if texts.make(k, i, RECORDS, 0, negatives=True) == record.rejected)] += 1
    assert counts == expected


def test_a_negative_is_the_real_answer_against_a_probe(base, dataset):
    rows, reward = tokenised(base, RECORDS), Reward(negatives=["thanks"], negatives_share=0.5)
    records, joined = negatives.added(base.tokenizer, dataset(), RECORDS, rows, reward, 3)
    assert records[:4] == RECORDS and joined.prompts[:4] == rows.prompts
    assert {record.id for record in records[4:]} == {1, 2, 3, 4}  # each once
    for record, prompt, chosen, rejected in zip(
        records[4:],
        joined.prompts[4:],
        joined.answers["chosen"][4:],
        joined.answers["rejected"][4:],
        strict=True,
    ):
        original = next(r for r in RECORDS if r.id == record.id)
        assert (record.prompt, record.chosen) == (original.prompt, original.chosen)
        assert prompt == ids(base, original.prompt)
        assert chosen == [*ids(base, f" {original.chosen}"), base.eos_id]
        assert rejected == [*ids(base, f" {record.rejected}"), base.eos_id]
        assert record.rejected.startswith(original.chosen + " ")


def test_the_same_seed_gives_the_same_rows_and_no_kinds_none(base, dataset, capsys):
    rows = tokenised(base, RECORDS)
    some = Reward(negatives=["short", "refusal"], negatives_share=0.3)
    found = [negatives.added(base.tokenizer, dataset(), RECORDS, rows, some, s)[0] for s in (0, 0, 2)]
    assert found[0] == found[1] != found[2]
    assert "synthetic negatives: 2 beside 4 real pairs (short 1, refusal 1)" in capsys.readouterr().out
    records, joined = negatives.added(base.tokenizer, dataset(), RECORDS, rows, Reward(), 0)
    assert records == RECORDS and joined is rows
