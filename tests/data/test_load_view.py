"""Rows -> records -> splits, the statistics, and every mistake a line each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_exp.data.load import (
    FAMILIES,
    check_view,
    fingerprint,
    load_view,
    locate,
    longer_chosen,
    statistics,
)
from rlhf_exp.data.records import SPLITS, Comparison
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Template, Views


def post(n: int) -> str:
    return f"SUBREDDIT: r/a\nTITLE: t\nPOST: number {n}"


def pair(n: int, chosen: str = "the first answer is better", rejected: str = "the other answer lost") -> dict:
    return {"prompt": post(n), "chosen": f"TL;DR: {chosen}", "rejected": f"TL;DR: {rejected}"}


def labelled(n: int, label: str = "a summary") -> dict[str, str]:
    return {"prompt": f"{post(n)}\nTL;DR:", "label": f" {label}"}


def problems(action) -> list[str]:
    with pytest.raises(InputError) as error:
        action()
    assert all(line and "\n" not in line for line in error.value.problems)
    return error.value.problems


def test_statistics_of_hand_written_rows(write, dataset):
    rows = [
        pair(1, chosen="four words are fewer than these", rejected="four words are fewer"),  # longer chosen
        pair(2, chosen="one two three 4", rejected="one two three 5"),  # a tie
        pair(3, chosen="one two three 4", rejected="one two three 4 but longer"),  # shorter chosen
        pair(4, chosen="one two three 4", rejected="one two three 4 but longer"),  # shorter chosen
        pair(5, chosen="same old words again", rejected="same old words again"),
        pair(6, chosen="too short", rejected="long enough to be counted"),
        pair(1, chosen="four words are fewer than these", rejected="four words are fewer"),  # again
    ]
    data = dataset("tldr", write("rows.jsonl", rows))
    found = statistics(data, "comparisons")
    assert found.rows == 7
    assert found.records == {"train": 4, "validation": 0, "heldout": 0}
    assert found.dropped == {"equal answers": 1, "under 5 words": 1, "duplicate": 1}
    assert found.longer_chosen == pytest.approx(1.5 / 4)
    line = str(found)
    assert line.startswith("comparisons: 7 rows -> 4 train, 0 validation, 0 heldout; left out: ")
    assert "1 under 5 words" in line and line.endswith("; the longer answer is the chosen one in 37.5 %")
    assert found.metrics() == {
        "data/comparisons/rows": 7.0,
        "data/comparisons/left_out": 3.0,
        "data/comparisons/train": 4.0,
        "data/comparisons/validation": 0.0,
        "data/comparisons/heldout": 0.0,
        "data/comparisons/longer_chosen": 0.375,
    }


def test_the_length_only_baseline():
    pairs = [Comparison(0, "p", "aaa", "b"), Comparison(0, "p", "aa", "b"), Comparison(0, "p", "a", "b")]
    assert longer_chosen(pairs) == pytest.approx((1 + 1 + 0.5) / 3)
    assert longer_chosen([Comparison(0, "p", "a", "bb")]) == 0


def test_a_prompt_is_in_the_same_split_in_every_view_and_file(write, dataset):
    """Both files hold the same posts, in another order and with or without "TL;DR:" at the end."""
    place = Views(
        demonstrations=str(write("sft.jsonl", [labelled(n) for n in range(200)])),
        comparisons=str(write("rm.jsonl", [pair(n) for n in reversed(range(200))])),
        prompts=str(write("rl.jsonl", [labelled(n) for n in range(0, 200, 2)])),
    )
    data = dataset("tldr", place, validation_share=0.2, heldout_share=0.3)
    ids = {
        view: {split: {r.id for r in load_view(data, view, split)} for split in SPLITS}
        for view in ("demonstrations", "comparisons", "prompts")
    }
    assert ids["demonstrations"] == ids["comparisons"]
    for split, prompts in ids["prompts"].items():
        assert prompts <= ids["demonstrations"][split]
    assert sum(map(len, ids["prompts"].values())) == 100
    assert 20 < len(ids["comparisons"]["validation"]) < 60 and 40 < len(ids["comparisons"]["heldout"]) < 80


def test_records_are_in_the_order_of_the_file(write, dataset):
    data = dataset("tldr", write("rows.jsonl", [pair(n) for n in (3, 1, 2)]))
    found = [r.prompt for r in load_view(data, "comparisons", "train")]
    assert found == [f"{post(n)}\nTL;DR:" for n in (3, 1, 2)]


def test_prompts_are_sampled_from_once_each(write, dataset):
    rows = [labelled(1), labelled(1, "another summary"), labelled(2)]
    data = dataset("tldr", write("rows.jsonl", rows))
    assert [p.reference for p in load_view(data, "prompts", "train")] == ["a summary", "a summary"]
    assert statistics(data, "prompts").dropped == {"duplicate": 1}
    assert len(load_view(data, "demonstrations", "train")) == 3


def test_limit_keeps_the_same_prompts_in_every_view(write, dataset):
    place = Views(
        demonstrations=str(write("sft.jsonl", [labelled(n) for n in range(60)])),
        comparisons=str(write("rm.jsonl", [pair(n) for n in reversed(range(60))])),
    )
    data = dataset("tldr", place, heldout_share=0.3, limit=10)
    demonstrations = load_view(data, "demonstrations", "train")
    comparisons = load_view(data, "comparisons", "train")
    assert len(demonstrations) == 10
    assert [r.prompt for r in demonstrations] == [r.prompt for r in reversed(comparisons)]
    numbers = [int(r.prompt.split("number ")[1].split("\n")[0]) for r in demonstrations]
    assert numbers == sorted(numbers) and numbers[-1] > 20  # in order, and from the whole file
    data.limit = 0
    everything = len(load_view(data, "demonstrations", "train"))
    data.limit = 1000
    assert len(load_view(data, "demonstrations", "train")) == everything > 10
    data.limit = 1
    assert len(load_view(data, "demonstrations", "heldout")) == 60 - everything


def test_bad_rows_are_named_with_file_line_and_reason(write, dataset):
    path = write("rows.jsonl", [pair(1), labelled(2), pair(3) | {"chosen": 7}, [1, 2]])
    data = dataset("tldr", path)
    assert problems(lambda: check_view(data, "comparisons")) == [
        f"{path}:2: no field 'chosen' (has: prompt, label)",
        f"{path}:3: field 'chosen' must be text, is a number",
        f"{path}:4: must be an object with fields, is a list",
        "dataset.on_bad_row=skip leaves bad rows out and counts them",
    ]


def test_only_the_first_bad_rows_are_named(write, dataset):
    path = write("rows.jsonl", [pair(1)] + [labelled(n) for n in range(12)])
    lines = problems(lambda: check_view(dataset("tldr", path), "comparisons"))
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{n}" for n in (2, 3, 4, 5, 6)]
    assert lines[5] == f"{path}: and 7 more bad rows of 13"
    assert len(lines) == 7


def test_bad_rows_are_counted_on_request(write, dataset):
    path = write("rows.jsonl", b'{"prompt": "\xff"}\nno json\n')
    with path.open("a") as file:
        file.write('{"prompt": "p", "chosen": "TL;DR: a b c d", "rejected": "TL;DR: e f g h"}\n')
    data = dataset("tldr", path, on_bad_row="skip")
    assert len(load_view(data, "comparisons", "train")) == 1
    assert statistics(data, "comparisons").dropped == {"bad": 2}
    assert statistics(data, "comparisons").rows == 3


def test_nothing_left(write, dataset):
    empty = write("empty.jsonl", "\n")
    assert problems(lambda: check_view(dataset("tldr", empty), "comparisons")) == [
        f"dataset.views.comparisons: {empty} has no rows"
    ]
    equal = write("equal.jsonl", [pair(n, "these are the same", "these are the same") for n in (1, 2)])
    assert problems(lambda: check_view(dataset("tldr", equal), "comparisons")) == [
        f"dataset.views.comparisons: all 2 rows of {equal} are left out: 2 equal answers"
    ]
    bad = write("bad.jsonl", "nonsense\n")
    lines = problems(lambda: check_view(dataset("tldr", bad, on_bad_row="skip"), "comparisons"))
    assert lines == [
        f"{bad}:1: not JSON: Expecting value (column 1)",
        f"dataset.views.comparisons: all 1 rows of {bad} are left out: 1 bad",
    ]


def test_an_empty_split_says_which_and_what_to_change(write, dataset):
    path = write("rows.jsonl", [pair(1)])
    data = dataset("tldr", path)
    assert problems(lambda: load_view(data, "comparisons", "heldout")) == [
        f"dataset.views.comparisons={path}: none of the 1 records falls into the heldout split "
        f"(validation_share=0.0, heldout_share=0.0): raise dataset.heldout_share or add data"
    ]
    assert load_view(data, "comparisons", "validation") == []  # share 0: not wanted
    data.validation_share = 0.001
    assert "validation split" in problems(lambda: load_view(data, "comparisons", "validation"))[0]
    check_view(data, "comparisons")
    assert "heldout split" in problems(lambda: check_view(data, "comparisons", ("train", "heldout")))[0]
    data.validation_share, data.heldout_share = 0.0, 0.999999
    assert "lower them" in problems(lambda: load_view(data, "comparisons", "train"))[0]


def test_views_and_families_that_are_not_there(write, dataset):
    data = dataset("tldr", Views(prompts=str(write("rows.jsonl", [labelled(1)]))))
    (line,) = problems(lambda: load_view(data, "comparisons", "train"))
    assert line == "dataset.views.comparisons is not set: dataset tldr does not say where its comparisons are"
    data.family = "tdlr"
    (line,) = problems(lambda: fingerprint(data, "prompts"))
    assert line == f"dataset.family must be one of {', '.join(FAMILIES)}, got tdlr"
    with pytest.raises(ValueError):
        load_view(data, "prompt", "train")
    with pytest.raises(ValueError):
        load_view(data, "prompts", "test")


def test_the_check_looks_at_the_template_too(write, dataset):
    template = Template("x", prompt="{prompt} {prompt}", response="answer")
    data = dataset("tldr", write("rows.jsonl", [pair(1)]), template=template)
    assert problems(lambda: check_view(data, "comparisons")) == [
        "dataset.template.prompt must hold {prompt} exactly once, got '{prompt} {prompt}'",
        "dataset.template.response must hold {response} exactly once, got 'answer'",
    ]


def test_a_file_that_changed_is_read_again(write, dataset):
    path = write("rows.jsonl", [pair(1)])
    data = dataset("tldr", path)
    assert locate(data, "comparisons") == path
    before = fingerprint(data, "comparisons")
    assert len(load_view(data, "comparisons", "train")) == 1
    write("rows.jsonl", [pair(1), pair(2)])
    assert len(load_view(data, "comparisons", "train")) == 2
    assert fingerprint(data, "comparisons") != before


def test_what_is_returned_is_the_callers_own(write, dataset):
    data = dataset("tldr", write("rows.jsonl", [pair(1), pair(2)]))
    load_view(data, "comparisons", "train").clear()
    assert len(load_view(data, "comparisons", "train")) == 2


def test_checking_data_loads_no_torch():
    code = """
import sys
from rlhf_exp.data import load
from rlhf_exp.schema import Dataset, Views

place = "builtin:reviews"
dataset = Dataset(name="reviews", family="reviews", views=Views(place, place, place))
for view in load.VIEWS:
    load.check_view(dataset, view, ("train", "validation", "heldout"))
    load.fingerprint(dataset, view)
heavy = ("torch", "transformers", "datasets", "huggingface_hub", "pyarrow", "hydra")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
