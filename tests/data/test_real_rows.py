"""The loaders on real rows in the published schemas (a folder outside the repository, see conftest.py).

Expected numbers are counted from the files by a few lines of this test, or are those of the folder's README.
"""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from rlhf_exp.data.encode import Cuts, encode_prompts
from rlhf_exp.data.load import FAMILIES, load_view, statistics
from rlhf_exp.data.records import SPLITS, Dialogue
from rlhf_exp.schema import HC3, Views

# folder -> family; tldr and tldr_openai have their views in two folders
FOLDERS = {
    "alpaca_en": "alpaca",
    "alpaca_zh": "alpaca",
    "dpo_en": "sharegpt_preference",
    "dpo_zh": "sharegpt_preference",
    "dpo_zh_medicalgpt": "sharegpt_preference",
    "hc3_en": "hc3",
    "hc3_zh": "hc3",
    "hh_rlhf_helpful_zh": "hh_rlhf_zh",
    "imdb_prompts": "imdb",
    "rlhf_reward_en": "rlhf_reward",
    "rlhf_reward_single_round_zh": "rlhf_reward",
    "sst2": "sst2",
}
TWO_FOLDERS = {
    "tldr": ("openai_summarize_tldr", "openai_summarize_comparisons"),
    "tldr_openai": ("tldr_3_filtered", "summarize_comparisons_raw"),
}


@pytest.fixture
def rows(real_data):
    """rows(folder) -> its rows as they are."""
    return lambda folder: [json.loads(line) for line in (real_data / folder / "train.jsonl").open("rb")]


@pytest.fixture
def shipped(real_data, dataset, monkeypatch):
    """shipped(folder or family) -> a Dataset of all its views, with the shares of a run."""

    def shipped(name: str, **fields):
        shares = {"validation_share": 0.1, "heldout_share": 0.1}
        if name not in TWO_FOLDERS:
            return dataset(FOLDERS[name], real_data / name, **shares | fields)
        posts, pairs = (str(real_data / folder) for folder in TWO_FOLDERS[name])
        return dataset(name, Views(posts, pairs, posts), **shares | fields)

    return shipped


def everything(data, view: str) -> list:
    return [record for split in SPLITS for record in load_view(data, view, split)]


def first_prompt(record) -> str:
    """What a dialogue begins with, without its whitespace."""
    asked = record.prompt
    if isinstance(asked, Dialogue):
        asked = asked.history[0][0] if asked.history else asked.prompt
    return "".join(asked.split())


def test_tldr_below_the_variable(real_data, dataset, monkeypatch):
    """The hub ids of the shipped config, found below RLHF_EXP_DATA."""
    monkeypatch.setenv("RLHF_EXP_DATA", str(real_data))
    posts, pairs = "CarperAI/openai_summarize_tldr", "CarperAI/openai_summarize_comparisons"
    data = dataset("tldr", Views(posts, pairs, posts))
    assert statistics(data, "prompts").rows == 1368 and statistics(data, "comparisons").rows == 690


@pytest.mark.parametrize("name", TWO_FOLDERS)
def test_tldr(shipped, rows, name):
    data = shipped(name)
    for view in ("demonstrations", "prompts"):
        found = statistics(data, view)
        assert (found.rows, sum(found.records.values()), found.dropped) == (1368, 1368, {})
    pairs = rows("summarize_comparisons_raw")  # the same pairs in both folders
    texts = [[summary["text"].strip() for summary in row["summaries"]] for row in pairs]
    assert not any(a == b or min(len(a.split()), len(b.split())) < 4 for a, b in texts)
    found = statistics(data, "comparisons")
    assert (found.rows, sum(found.records.values()), found.dropped) == (690, 690, {})
    wins = sum(
        len(text[row["choice"]]) > len(text[1 - row["choice"]])
        for row, text in zip(pairs, texts, strict=True)
    )
    ties = sum(len(a) == len(b) for a, b in texts)
    assert found.longer_chosen == pytest.approx((wins + ties / 2) / 690)
    assert found.longer_chosen == pytest.approx(0.68, abs=0.01)  # README
    chosen = {c.chosen for c in everything(data, "comparisons")}
    assert chosen == {text[row["choice"]] for row, text in zip(pairs, texts, strict=True)}


def test_both_forms_of_tldr_have_the_same_posts_in_the_same_splits(shipped):
    for view in ("demonstrations", "comparisons", "prompts"):
        for split in SPLITS:
            carper, openai = (load_view(shipped(name), view, split) for name in TWO_FOLDERS)
            assert list(map(first_prompt, carper)) == list(map(first_prompt, openai))


@pytest.mark.parametrize("answers", ["chatgpt", "human", "both"])
@pytest.mark.parametrize("folder", ["hc3_zh", "hc3_en"])
def test_hc3(shipped, rows, folder, answers):
    whose = ["chatgpt", "human"] if answers == "both" else [answers]
    given = [
        (row["question"].strip(), a) for row in rows(folder) for who in whose for a in row[f"{who}_answers"]
    ]
    kept = [(q, a.strip().replace("\r\n", "\n").replace("\r", "\n")) for q, a in given if a and a.strip()]
    data = shipped(folder, hc3=HC3(answers=answers))
    found, dropped = everything(data, "demonstrations"), dict(statistics(data, "demonstrations").dropped)
    assert {(d.prompt, d.response) for d in found} == set(kept)
    assert dropped.pop("empty answer", 0) == len(given) - len(kept)
    assert dropped.pop("duplicate", 0) == len(kept) - len(set(kept))
    nothing = sum(not any(row[f"{who}_answers"] for who in whose) for row in rows(folder))
    assert dropped == ({"no answer": nothing} if nothing else {})
    assert len(found) == len(set(kept)) > 1000
    assert not any("\r" in d.response for d in found)


def test_hc3_prompts(shipped, rows):
    for folder in ("hc3_zh", "hc3_en"):
        questions = [row["question"].strip() for row in rows(folder)]
        found = everything(shipped(folder), "prompts")
        assert {p.prompt for p in found} == set(questions)
        again = len(questions) - len(set(questions))
        assert statistics(shipped(folder), "prompts").dropped == ({"duplicate": again} if again else {})
    # every English question is one of reddit's, in one of two wordings
    stripped = everything(shipped("hc3_en", hc3=HC3(strip_eli5=True)), "prompts")
    assert len(stripped) == 1440 and not any(
        "explain like i'm five" in p.prompt.lower()[-25:] for p in stripped
    )


def test_hc3_sources(shipped, rows):
    data = shipped("hc3_zh", hc3=HC3(sources=["law", "medicine"]))
    law = {row["question"].strip() for row in rows("hc3_zh") if row["source"] in ("law", "medicine")}
    assert {p.prompt for p in everything(data, "prompts")} == law
    assert statistics(data, "prompts").dropped["of another source"] == 3188 - 266 - 461  # README


@pytest.mark.parametrize(
    ("folder", "longer"),
    [
        ("dpo_en", None),
        ("dpo_zh", 0.63),
        ("dpo_zh_medicalgpt", None),
        ("hh_rlhf_helpful_zh", None),
        ("rlhf_reward_en", None),
        ("rlhf_reward_single_round_zh", 0.63),  # README of the data
    ],
)
def test_comparisons(shipped, rows, folder, longer):
    def answer(row, name: str) -> str:
        value = row[name]
        value = value if isinstance(value, str) else value.get("value") or value.get("text")
        return value.removeprefix("Assistant:").strip()

    both = [(answer(row, "chosen"), answer(row, "rejected")) for row in rows(folder)]
    kept = [(a, b) for a, b in both if a != b]
    found = everything(shipped(folder), "comparisons")
    assert sorted((c.chosen, c.rejected) for c in found) == sorted(kept)
    seen = statistics(shipped(folder), "comparisons")
    assert seen.dropped == ({"equal answers": len(both) - len(kept)} if len(both) > len(kept) else {})
    share = sum((len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in kept) / len(kept)
    assert seen.longer_chosen == pytest.approx(share)
    assert longer is None or share == pytest.approx(longer, abs=0.01)
    assert sorted(d.response for d in everything(shipped(folder), "demonstrations")) == sorted(
        a for a, _ in both
    )
    prompts = statistics(shipped(folder), "prompts")
    assert sum(prompts.records.values()) + prompts.dropped.get("duplicate", 0) == prompts.rows == len(both)


def test_dialogues_have_all_their_turns(shipped, rows):
    def turns(record) -> int:
        return 1 + 2 * len(record.prompt.history) if isinstance(record.prompt, Dialogue) else 1

    lengths = sorted(len(row["context"]) for row in rows("hh_rlhf_helpful_zh"))
    assert sorted(map(turns, everything(shipped("hh_rlhf_helpful_zh"), "demonstrations"))) == lengths
    talks = [row["conversations"] for row in rows("dpo_en")]
    lengths = sorted(sum(turn["from"] != "system" for turn in talk) for talk in talks)
    assert sorted(map(turns, everything(shipped("dpo_en"), "demonstrations"))) == lengths
    systems = sorted(talk[0]["value"].strip() for talk in talks if talk[0]["from"] == "system")
    found = [
        r.prompt.system
        for r in everything(shipped("dpo_en"), "demonstrations")
        if isinstance(r.prompt, Dialogue)
    ]
    assert sorted(filter(None, found)) == systems and len(systems) == 57


def test_the_same_pairs_in_two_schemas_are_the_same_records(shipped):
    """The English ones are written with marks, and the Chinese single rounds without turns, see their READMEs."""
    for view in ("demonstrations", "comparisons", "prompts"):
        assert everything(shipped("rlhf_reward_en"), view) == everything(shipped("dpo_en"), view)
        single = everything(shipped("rlhf_reward_single_round_zh"), view)
        among = everything(shipped("hh_rlhf_helpful_zh"), view)
        assert [r for r in among if isinstance(r.prompt, str)] == single


@pytest.mark.parametrize("folder", ["alpaca_en", "alpaca_zh"])
def test_alpaca(shipped, rows, folder):
    expected = []
    for row in rows(folder):
        more = "\n" + row["input"].strip() if row["input"].strip() else ""
        expected.append((row["instruction"].strip() + more, row["output"].strip()))
    found = everything(shipped(folder), "demonstrations")
    assert sorted((d.prompt, d.response) for d in found) == sorted(expected)
    assert sorted((p.prompt, p.reference) for p in everything(shipped(folder), "prompts")) == sorted(expected)


@pytest.mark.parametrize(("folder", "field"), [("sst2", "sentence"), ("imdb_prompts", "text")])
def test_openings(shipped, rows, folder, field):
    words = [row[field].replace("<br />", " ").split() for row in rows(folder)]
    long = [(w[:4], w[4:]) for w in words if len(w) >= 8]
    found = everything(shipped(folder), "demonstrations")
    again = {(tuple(a), tuple(b)) for a, b in long}
    assert {(tuple(d.prompt.split()), tuple(d.response.split())) for d in found} == again
    dropped = {"too short": len(words) - len(long), "duplicate": len(long) - len(found)}
    assert statistics(shipped(folder), "demonstrations").dropped == {k: n for k, n in dropped.items() if n}
    prompts = everything(shipped(folder), "prompts")
    assert sorted(p.prompt for p in prompts) == sorted({" ".join(a) for a, _ in long})


@pytest.mark.parametrize("name", [*FOLDERS, *TWO_FOLDERS])
def test_nothing_is_trained_on_in_one_view_and_evaluated_on_in_another(shipped, name):
    data = shipped(name)
    views = import_module(FAMILIES[data.family]).VIEWS
    openings = {s: {first_prompt(r) for view in views for r in load_view(data, view, s)} for s in SPLITS}
    assert not openings["train"] & (openings["validation"] | openings["heldout"])
    assert not openings["validation"] & openings["heldout"]
    total = sum(map(len, openings.values()))
    assert all(0.04 < len(openings[s]) / total < 0.17 for s in ("validation", "heldout"))


@pytest.mark.parametrize("name", TWO_FOLDERS)
def test_posts_keep_their_title_and_end_when_cut(shipped, tokenizer, name):
    cuts = Cuts()
    data = shipped(name, max_prompt_tokens=800)  # bytes
    if name == "tldr_openai":
        data.template = shipped("tldr").template
    prompts = [p.prompt for p in load_view(data, "prompts", "train")][:200]
    end = "\nTL;DR:" if name == "tldr" else "\n\nTL;DR:"
    assert all(p.startswith("SUBREDDIT: r/") and p.endswith(end) for p in prompts)
    shorter = 0
    for prompt, ids in zip(prompts, encode_prompts(tokenizer, data, prompts, cuts), strict=True):
        text = tokenizer.decode(ids)
        assert len(ids) <= 800 and text.endswith(end)
        assert text.startswith(prompt.split("\nPOST:", 1)[0])
        assert prompt.startswith(text.removesuffix(end))
        shorter += text != prompt
    assert 50 < shorter < 200
