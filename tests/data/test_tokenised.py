"""Token ids from the cache are those that were computed, and nothing stale is ever taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_exp.data import tokenised as module
from rlhf_exp.data.encode import Cuts, quantile
from rlhf_exp.data.tokenised import tokenised

EOS = 256
ROWS = [
    {"domain": "film", "opening": "ab", "upbeat": "good", "downbeat": "b"},
    {"domain": "film", "opening": "c", "upbeat": "so-so", "downbeat": "bad"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenised"


@pytest.fixture
def work(monkeypatch):
    """How often a split was really tokenised."""
    calls: list[str] = []
    original = module._tokenise
    monkeypatch.setattr(module, "_tokenise", lambda *a: calls.append(a[2]) or original(*a))
    return calls


def test_a_view_as_ids(tokenizer, dataset, write):
    rows = tokenised(tokenizer, "k", dataset("reviews", write("train.jsonl", ROWS)), "comparisons", "train")
    decode = tokenizer.decode
    assert [decode(ids) for ids in rows.prompts] == ["ab", "c"]
    assert {name: [decode(ids[:-1]) for ids in answers] for name, answers in rows.answers.items()} == {
        "chosen": [" good", " so-so"],
        "rejected": [" b", " bad"],
    }
    assert all(ids[-1] == EOS for answers in rows.answers.values() for ids in answers)
    assert rows.cuts == Cuts([2, 1], [6, 7, 3, 5])


@pytest.mark.parametrize("view", ["demonstrations", "comparisons", "prompts"])
def test_the_second_time_it_is_read(tokenizer, dataset, write, work, cache, view):
    data = dataset("reviews", write("train.jsonl", ROWS), max_response_tokens=4)
    first = tokenised(tokenizer, "k", data, view, "train")
    assert tokenised(tokenizer, "k", data, view, "train") == first
    assert work == [view] and len(list(cache.iterdir())) == 1
    assert first.cuts.responses_cut == {"demonstrations": 3, "comparisons": 3, "prompts": 0}[view]


def test_whatever_matters_makes_it_anew(tokenizer, dataset, write, work):
    place = write("train.jsonl", ROWS)
    data = dataset("reviews", place)

    def again(key: str = "k", view: str = "demonstrations", **changes) -> int:
        tokenised(tokenizer, key, replace(data, **changes), view, "train")
        return len(work)

    assert again() == 1
    assert again(key="another tokenizer") == 2
    assert again(view="prompts") == 3
    assert again(max_response_tokens=3) == 4
    assert again(template=replace(data.template, prompt="Q: {prompt}")) == 5
    assert again(limit=1) == 6
    assert again(name="only for display") == 6
    write("train.jsonl", [*ROWS, {**ROWS[0], "opening": "another"}])
    assert again() == 7


def test_what_a_loader_makes_of_the_same_file_counts(tokenizer, dataset, write, work, monkeypatch):
    from rlhf_exp.data import reviews

    data = dataset("reviews", write("train.jsonl", ROWS))
    assert len(tokenised(tokenizer, "k", data, "prompts", "train").prompts) == 2
    original = reviews.prompts
    monkeypatch.setitem(reviews.VIEWS, "prompts", lambda row, d: original({**row, "opening": "z"}, d))
    from rlhf_exp.data import load

    load._read.cache_clear()
    assert tokenised(tokenizer, "k", data, "prompts", "train").prompts == [tokenizer("z")["input_ids"]]
    load._read.cache_clear()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x" + b[41:]])
def test_a_broken_file_is_made_anew(tokenizer, dataset, write, work, cache, damage):
    data = dataset("reviews", write("train.jsonl", ROWS))
    first = tokenised(tokenizer, "k", data, "prompts", "train")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert tokenised(tokenizer, "k", data, "prompts", "train") == first
    assert len(work) == 2 and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_only_costs_time(
    tokenizer, dataset, write, work, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "file"))
    data = dataset("reviews", write("train.jsonl", ROWS))
    assert tokenised(tokenizer, "k", data, "prompts", "train").cuts.prompts == 2


def test_quantiles_are_values_that_occur():
    assert [quantile([4, 1, 3, 2], q) for q in (0.05, 0.5, 0.51, 0.75, 1.0)] == [1, 2, 3, 3, 4]
    cuts = Cuts([4, 1, 3, 2], [], 1, 0)
    assert str(cuts) == "prompt tokens: median 2, 90 % in 1-4, longest 4; 1 of 4 cut"
    assert cuts.metrics() == {
        "data/prompts_cut": 1.0,
        "data/responses_cut": 0.0,
        "data/prompt_tokens_p5": 1.0,
        "data/prompt_tokens_p50": 2.0,
        "data/prompt_tokens_p95": 4.0,
        "data/prompt_tokens_p100": 4.0,
    }
