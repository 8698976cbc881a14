"""No file makes a traceback: whatever is in it, a view loads, or an InputError says why not, line by line."""

from __future__ import annotations

import json
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_exp.data.load import VIEWS, check_view, fingerprint, load_view, statistics
from rlhf_exp.data.templates import encode_prompts, encode_responses
from rlhf_exp.errors import InputError

FIELDS = {
    "reviews": ["opening", "upbeat", "downbeat", "domain"],
    "tldr": ["prompt", "label", "chosen", "rejected"],
}
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=30),  # surrogates, controls, all of it
    st.sampled_from(
        ["", " ", "TL;DR:", "TL;DR: a b c d e", "\nPOST: a b\nc", "</s>", "\ufeff", "\x00", "\ud83d"]
    ),
)
VALUES = st.recursive(
    st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
NUMBER = count()


def lines(family: str) -> st.SearchStrategy[bytes]:
    """A row with some of the right fields and mostly text in them, any JSON, or any bytes."""
    names = st.one_of(st.sampled_from(FIELDS[family]), TEXTS)
    fields = st.dictionaries(names, st.one_of(TEXTS, TEXTS, VALUES), max_size=6)
    whole = st.fixed_dictionaries({name: TEXTS for name in FIELDS[family]})
    rows = st.one_of(whole, fields, VALUES).map(lambda value: json.dumps(value).encode())
    return st.one_of(rows, rows, st.binary(max_size=40))


@pytest.mark.parametrize("family", FIELDS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_traceback(family, data, tmp_path, dataset, tokenizer):
    content = b"\n".join(data.draw(st.lists(lines(family), max_size=4)))
    suffix = data.draw(st.sampled_from(["jsonl", "jsonl", "json", "parquet"]))
    path = tmp_path / f"{next(NUMBER)}.{suffix}"
    path.write_bytes(b"[" + content if suffix == "json" and data.draw(st.booleans()) else content)
    skip = data.draw(st.sampled_from(["skip", "error"]))
    chosen = dataset(family, path, on_bad_row=skip, max_prompt_tokens=12, max_response_tokens=4)
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
