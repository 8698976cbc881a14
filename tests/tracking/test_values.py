from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import Enum

import pytest

from rlhf_exp.tracking import values


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("objective/kl", "objective/kl"),
        ("time per step.s", "time per step.s"),
        ("acc%", "acc_"),
        ("a:b(c)", "a_b_c_"),
        ("/a//b/", "a/b"),
        ("../a/./b", "a/b"),
        ("..", "_"),
        ("", "_"),
        ("质量", "质量"),
    ],
)
def test_clean_name(name: str, expected: str) -> None:
    assert values.clean_name(name) == expected


def test_mlflow_accepts_every_cleaned_name() -> None:
    from mlflow.utils.validation import _validate_metric

    for name in (
        "a%b",
        "//",
        "a/../..",
        "x" * 300,
        "tab\there",
        "emoji 🙂",
        "a\nb",
        "-",
        "back\\slash",
        "$[0]",
    ):
        _validate_metric(values.clean_name(name), 1.0, 0, 0)  # raises if it does not


def test_long_names_stay_different() -> None:
    one, other = values.clean_name("x" * 300 + "a"), values.clean_name("x" * 300 + "b")
    assert len(one) == len(other) == 250
    assert one != other


def test_number() -> None:
    torch = pytest.importorskip("torch")
    np = pytest.importorskip("numpy")
    assert values.number(True) == 1.0
    assert values.number(np.float32(0.5)) == 0.5
    assert values.number(torch.tensor(2.25)) == 2.25
    assert math.isnan(values.number(torch.tensor(math.nan)))
    assert values.number(10**400) == math.inf
    assert values.number(-(10**400)) == -math.inf
    for bad in (None, "1.0", b"1", [1.0], torch.zeros(2), object()):
        with pytest.raises(TypeError, match="not a number"):
            values.number(bad)


def test_as_text() -> None:
    class Color(Enum):
        RED = "red"

    assert values.as_text(None) == "null"
    assert values.as_text(False) == "false"
    assert values.as_text(1e-05) == "1e-05"
    assert values.as_text(["q_proj", None, 1]) == '["q_proj", null, 1]'
    assert values.as_text(("é",)) == '["é"]'
    assert values.as_text({}) == "{}"
    assert values.as_text("as it is") == "as it is"
    assert values.as_text(Color.RED) == "red"


def test_cut_says_what_is_missing() -> None:
    assert values.cut("abc", 3) == "abc"
    cut = values.cut("a" * 7000, 6000)
    assert len(cut) == 6000
    assert cut.startswith("aaa")
    assert cut.endswith("... [cut, 7000 characters]")


def test_flatten() -> None:
    @dataclass
    class Inner:
        r: int = 8

    @dataclass
    class Outer:
        lora: Inner = field(default_factory=Inner)
        name: str = "x"

    assert values.flatten(Outer()) == {"lora.r": 8, "name": "x"}
    assert values.flatten({"a": {"b": {"c": 1}, "d": None}, "e": {}, "f": Inner()}) == {
        "a.b.c": 1,
        "a.d": None,
        "e": {},
        "f.r": 8,
    }


def test_batches_by_count_and_by_size() -> None:
    assert list(values.batches([1, 2, 3, 4, 5], 2, lambda _: 1)) == [[1, 2], [3, 4], [5]]
    half = values.REQUEST_BYTES // 2
    assert list(values.batches("abc", 10, lambda _: half)) == [["a", "b"], ["c"]]
    assert list(values.batches("ab", 10, lambda _: 3 * half)) == [["a"], ["b"]]
    assert list(values.batches([], 10, len)) == []


def test_table_json() -> None:
    rows = [{"prompt": "p", "score": math.nan, "n": 3}, {"prompt": "q", "extra": ["x"], "score": 0.5}]
    assert json.loads(values.table_json(rows)) == {
        "columns": ["prompt", "score", "n", "extra"],
        "data": [["p", None, 3, None], ["q", 0.5, None, '["x"]']],
    }
