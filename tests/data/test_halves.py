"""dataset.half: two models that train on the same comparisons never see the same prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.data.records import half_of, split_of
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Dataset, Views


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(name="reviews", family="reviews", views=Views(*["builtin:reviews"] * 3))


def test_the_halves_of_training_are_disjoint_and_together_everything(dataset):
    whole = load_view(dataset, "comparisons", "train")
    first, second = (
        load_view(replace(dataset, half=half), "comparisons", "train") for half in ("first", "second")
    )
    assert not {c.prompt for c in first} & {c.prompt for c in second}
    assert len(first) + len(second) == len(whole)
    assert {*first, *second} == {*whole}
    assert 0.3 < len(first) / len(whole) < 0.7
    counted = statistics(replace(dataset, half="first"), "comparisons")
    assert counted.records["train"] == len(first)
    assert counted.dropped["of the other half"] == len(second)
    assert "of the other half" not in statistics(dataset, "comparisons").dropped


@pytest.mark.parametrize(("view", "split"), [("prompts", "train"), ("demonstrations", "train"),
                                             ("comparisons", "validation"), ("comparisons", "heldout")])  # fmt: skip
def test_everything_else_stays_whole(dataset, view, split):
    assert load_view(replace(dataset, half="first"), view, split) == load_view(dataset, view, split)


def test_it_is_independent_of_the_split_and_comes_before_the_limit(dataset):
    ids = range(20_000)
    held = [id for id in ids if split_of(id, 0.1, 0.1) == "heldout"]
    for group in (ids, held):
        assert abs(sum(half_of(id) == "first" for id in group) / len(group) - 0.5) < 0.03
    both = [
        len(load_view(replace(dataset, half=h, limit=10), "comparisons", "train"))
        for h in ("first", "second")
    ]
    assert both == [10, 10]


def test_a_half_without_a_row_says_which(dataset, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    one = replace(
        dataset, family="jsonl", views=Views(None, str(path)), validation_share=0.0, heldout_share=0.0
    )
    found = []
    for half in ("first", "second"):
        try:
            found += load_view(replace(one, half=half), "comparisons", "train")
        except InputError as error:
            (line,) = error.problems
            assert f"half={half}" in line
    assert len(found) == 1
