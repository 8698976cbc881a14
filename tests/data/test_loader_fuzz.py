"""No row makes a traceback: it becomes records that can be trained on, or a reason, and in a file a line of an
InputError."""

from __future__ import annotations

import gzip
import json
from copy import deepcopy
from importlib import import_module
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_exp.data.encode import encode_prompts, encode_responses
from rlhf_exp.data.load import FAMILIES, VIEWS, check_view, fingerprint, load_view, statistics
from rlhf_exp.data.records import BadRow, Comparison, Demonstration, Dialogue, Drop, Prompt, prompt_id
from rlhf_exp.errors import InputError
from rlhf_exp.schema import HC3, Dataset, Fields

HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
TALK = [{"role": "human", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "human", "text": "c"}]
SAID = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]
POST = {"id": "t3_1", "subreddit": "a", "title": "b", "post": "c d\ne"}
# family -> sound rows, which are then spoiled
VALID = {
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]}],
    "hc3": [{"question": "a", "human_answers": ["b", None], "chatgpt_answers": ["", "c"], "source": "law"}],
    "hh_rlhf": [{"chosen": HH + "d", "rejected": HH + "e"}, {"chosen": HH + "d", "rejected": "\n\nHuman: a"}],
    "hh_rlhf_zh": [
        {
            "context": TALK,
            "chosen": {"role": "assistant", "text": "d"},
            "rejected": {"role": "assistant", "text": "e"},
        }
    ],
    "imdb": [{"text": "a b c d e f<br /><br />g h i", "label": 1}],
    "jsonl": [
        {"prompt": {"a": "b"}, "response": "c", "chosen": "d", "rejected": "e", "before": [["f", "g"]]}
    ],
    "reviews": [{"opening": "a", "upbeat": "b", "downbeat": "c", "domain": "film"}],
    "rlhf_reward": [
        {"prompt": "Human: a\n\n", "chosen": "Assistant: b", "rejected": "Assistant: c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ],
    "sharegpt_preference": [
        {
            "conversations": SAID,
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {"conversations": SAID, "chosen": "b", "rejected": "c", "system": "d"},
    ],
    "sst2": [{"sentence": "a b c d e f g h", "label": 0, "idx": 1}],
    "tldr": [
        {
            "prompt": "\nPOST: a\nTL;DR:",
            "label": " b",
            "chosen": "TL;DR: a b c d",
            "rejected": "TL;DR: e f g h",
        }
    ],
    "tldr_openai": [
        POST | {"summary": " f"},
        {"info": POST, "summaries": [{"text": "a b c d"}, {"text": "e f g h"}], "choice": 0},
        {"info": {"article": "a", "post": None}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
    ],
}
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=30),  # surrogates, controls, all of it
    st.sampled_from(
        ["", " ", "TL;DR:", "TL;DR: a b c d e", "\nPOST: a b\nc", "</s>", "\ufeff", "\x00", "\ud83d", "\x1c"]
    ),
    st.sampled_from(["Human:", "\n\nHuman: x", "\n\nAssistant:", "human", "gpt", "system", "<br />", "\r\n"]),
)
VALUES = st.recursive(
    st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
OPTIONS = st.fixed_dictionaries(
    {
        "hc3": st.builds(
            HC3, st.sampled_from(["chatgpt", "human", "both"]), st.booleans(), st.sampled_from([[], ["law"]])
        ),
        "early_difference": st.sampled_from(["drop", "cut"]),
        "prompt_words": st.integers(1, 6),
        "fields": st.sampled_from(
            [
                Fields(),
                Fields("prompt.a", reference="rejected", system="chosen", history="before"),
                Fields("", "."),
            ]
        ),
    }
)
NUMBER = count()
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def places(value):
    """(container, key) of everything inside a row."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def spoiled(draw, family: str):
    """A sound row after up to three changes somewhere in it."""
    row = deepcopy(draw(st.sampled_from(VALID[family])))
    for _ in range(draw(st.integers(0, 3))):
        where = list(places(row))
        if not where:
            break
        container, key = draw(st.sampled_from(where))
        change = draw(st.sampled_from(["empty", "empty", "replace", "text", "join", "remove", "repeat"]))
        if change == "remove":
            del container[key]
        elif change == "repeat" and isinstance(container, list):
            container.append(deepcopy(container[key]))
        elif change == "empty" and isinstance(container[key], str):
            container[key] = ""
        elif change == "join" and isinstance(container[key], str):
            container[key] += draw(TEXTS)
        else:
            container[key] = draw(TEXTS if change == "text" else VALUES)
    return row


def rows(family: str) -> st.SearchStrategy:
    """Spoiled rows, any fields of the right names, any JSON."""
    names = sorted({name for row in VALID[family] for name in row})
    fields = st.dictionaries(st.one_of(st.sampled_from(names), TEXTS), st.one_of(TEXTS, VALUES), max_size=6)
    return st.one_of(spoiled(family), spoiled(family), fields, VALUES)


def test_every_family_that_reads_files_is_here():
    generated = {name for name in FAMILIES if hasattr(import_module(FAMILIES[name]), "GENERATE")}
    assert set(VALID) == set(FAMILIES) - generated
    for family, sound in VALID.items():
        functions = import_module(FAMILIES[family]).VIEWS
        data = Dataset(name="x", family=family, fields=Fields("prompt.a"))
        for view in functions:
            assert any(_records(functions[view], row, data) for row in sound), (family, view)


def _records(function, row, data) -> list:
    try:
        return function(row, data)
    except (BadRow, Drop) as reason:
        assert str(reason).isprintable() and str(reason)
        return []


def sound(text: object) -> bool:
    return isinstance(text, str) and text == text.strip() != "" and bool(text.encode())


@pytest.mark.parametrize("family", VALID)
@FUZZ
@given(data=st.data())
def test_rows_become_records_or_reasons(family, data):
    row, options = data.draw(rows(family).filter(lambda row: isinstance(row, dict))), data.draw(OPTIONS)
    chosen = Dataset(name="x", family=family, **options)
    before = repr(row)
    kinds = {"demonstrations": Demonstration, "comparisons": Comparison, "prompts": Prompt}
    for view, function in import_module(FAMILIES[family]).VIEWS.items():
        for record in _records(function, row, chosen):
            if isinstance(record, Drop):
                continue
            assert isinstance(record, kinds[view]) and record.id == prompt_id(record.prompt)
            asked = record.prompt
            if isinstance(asked, Dialogue):
                assert asked.history or asked.system
                assert all(map(sound, [asked.prompt, *(text for pair in asked.history for text in pair)]))
                assert not asked.system or sound(asked.system)
            else:
                assert sound(asked)
            answers = [getattr(record, n) for n in ("response", "chosen", "rejected") if hasattr(record, n)]
            assert all(map(sound, answers)) and len(set(answers)) == len(answers)
            assert getattr(record, "reference", None) is None or sound(record.reference)
    assert repr(row) == before


@pytest.mark.parametrize("family", VALID)
@FUZZ
@given(data=st.data())
def test_no_file_makes_a_traceback(family, data, tmp_path, dataset, tokenizer):
    line = st.one_of(rows(family).map(lambda row: json.dumps(row).encode()), st.binary(max_size=40))
    content = b"\n".join(data.draw(st.lists(line, max_size=4)))
    suffix = data.draw(st.sampled_from(["jsonl", "jsonl", "json", "jsonl.gz", "parquet"]))
    path = tmp_path / f"{next(NUMBER)}.{suffix}"
    if suffix == "jsonl.gz" and data.draw(st.booleans()):
        content = gzip.compress(content)[: data.draw(st.sampled_from([None, -1, 12]))]
    path.write_bytes(b"[" + content if suffix == "json" and data.draw(st.booleans()) else content)
    skip = data.draw(st.sampled_from(["skip", "error"]))
    options = data.draw(OPTIONS)
    chosen = dataset(family, path, on_bad_row=skip, max_prompt_tokens=12, max_response_tokens=4, **options)
    for view in VIEWS:
        try:
            check_view(chosen, view)
            records = load_view(chosen, view, "train")
            assert str(statistics(chosen, view)) and len(fingerprint(chosen, view)) == 64
            prompts = encode_prompts(tokenizer, chosen, [record.prompt for record in records])
            answers = [
                getattr(r, name) for r in records for name in ("response", "chosen") if hasattr(r, name)
            ]
            responses = encode_responses(tokenizer, chosen, answers)
        except InputError as error:
            assert all(line.isprintable() for line in error.problems), error.problems
        else:
            assert all(0 < len(ids) <= 12 for ids in prompts) and all(0 < len(ids) <= 4 for ids in responses)
            assert all(0 <= record.id < 2**63 for record in records)
