"""The search space: what the pages of Hydra's optuna plugin say, case by case."""

from __future__ import annotations

import pytest
from hydra_plugins.rlhf_optuna import _space
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rlhf_exp.errors import InputError

OLD = "hydra.sweeper.search_space"


def only(line, **settings):
    """The one parameter of a space."""
    (found,) = _space.read([line], **settings).searched.values()
    return found


# of the plugin's page, and of the table in its own tests
@pytest.mark.parametrize(
    ("value", "distribution"),
    [
        ("choice(1,2)", CategoricalDistribution([1, 2])),
        ("1,2", CategoricalDistribution([1, 2])),
        ("choice(-5.0, 0.0, 5.0)", CategoricalDistribution([-5.0, 0.0, 5.0])),
        ("choice(true, false)", CategoricalDistribution([True, False])),
        ("choice('hello', 'world')", CategoricalDistribution(["hello", "world"])),
        ("shuffle(range(1,3))", CategoricalDistribution([1, 2])),
        ("range(1,3)", IntDistribution(1, 3)),
        ("range(-5, 5)", IntDistribution(-5, 5)),
        ("range(0,10,step=5)", IntDistribution(0, 10, step=5)),
        ("range(-5.5,5.5,step=0.5)", FloatDistribution(-5.5, 5.5, step=0.5)),
        ("range(0.5, 5.5, step=1)", FloatDistribution(0.5, 5.5, step=1)),
        ("interval(1, 5)", FloatDistribution(1, 5)),
        ("interval(-5.0, 5.0)", FloatDistribution(-5, 5)),
        ("int(interval(1, 5))", IntDistribution(1, 5)),
        ("int(interval(-5.0, 5.0))", IntDistribution(-5, 5)),
        ("tag(log, interval(1, 10))", FloatDistribution(1, 10, log=True)),
        ("tag(log, interval(1e-3, 1))", FloatDistribution(1e-3, 1, log=True)),
        ("tag(log, int(interval(1, 5)))", IntDistribution(1, 5, log=True)),
    ],
)
def test_an_override_is_the_distribution_that_the_page_says(value, distribution):
    assert only(f"key={value}").distribution == distribution


@pytest.mark.parametrize(
    ("given", "distribution"),
    [
        ({"type": "categorical", "choices": [-5, 0, 5]}, CategoricalDistribution([-5, 0, 5])),
        ({"type": "int", "low": 0, "high": 10, "step": 2}, IntDistribution(0, 10, step=2)),
        ({"type": "int", "low": 1, "high": 100, "log": True}, IntDistribution(1, 100, log=True)),
        ({"type": "float", "low": 0, "high": 1}, FloatDistribution(0, 1)),
        ({"type": "float", "low": -5.5, "high": 5.5, "step": 0.5}, FloatDistribution(-5.5, 5.5, step=0.5)),
        ({"type": "float", "low": 1, "high": 100, "log": True}, FloatDistribution(1, 100, log=True)),
    ],
)
def test_the_older_form_in_a_config(given, distribution):
    space = _space.read(["stage=ppo"], search_space={"key": given})
    assert space.searched["key"].distribution == distribution


@pytest.mark.parametrize(
    ("value", "grid"),
    [
        ("choice(a, b)", ["a", "b"]),
        ("range(1,4)", [1, 2, 3]),  # as Hydra without optuna: before the end
        ("range(0,10,step=5)", [0, 5]),
        ("range(0,1,step=0.25)", [0.0, 0.25, 0.5, 0.75]),
        ("int(interval(1,4))", [1, 2, 3, 4]),
        ("shuffle(range(1,4))", [1, 2, 3]),  # in the same order in every process
    ],
)
def test_a_grid_has_these_values(value, grid):
    assert _space.read([f"key={value}"]).grid() == {"key": grid}


def test_a_grid_has_an_end():
    space = _space.read(["a=interval(0,1)", "b=1,2", "c=tag(log, interval(1, 2))"])
    with pytest.raises(InputError) as error:
        space.grid()
    assert error.value.problems == [
        f"{key}: a grid needs values: write choice(...) or range(...)" for key in "ac"
    ]


def test_later_ones_win_and_one_value_is_fixed():
    space = _space.read(
        ["stage=ppo", "a=7", "c=interval(0,1)", "++upstream.sft.optim.lr=1e-3,1e-4", "~model", "d=choice(x)"],
        params={"a": "1,2", "b": "range(1,3)", "c": 5, "e": None, "f": True},
    )
    assert list(space.searched) == ["b", "c", "upstream.sft.optim.lr"]
    assert space.searched["c"].distribution == FloatDistribution(0, 1)
    assert list(space.fixed.values()) == ["e=null", "f=True", "stage=ppo", "a=7", "~model", "d=x"]
    assert space.overrides({"b": 2, "c": 0.25, "upstream.sft.optim.lr": 1e-4}) == [
        *("e=null", "f=True", "stage=ppo", "a=7", "~model", "d=x", "b=2", "c=0.25"),
        "++upstream.sft.optim.lr=0.0001",
    ]


@pytest.mark.parametrize(
    "value",
    [
        "1e-05", "-0.001", "12345678.9", "null", "true", "abc", "'two words'", "'a,b'", '"it\'s"', "[1,2]",
        "{lr:0.001,name:x}", "'1'", "a\\,b", "${seed}",
    ],
)  # fmt: skip
def test_a_choice_is_written_so_that_hydra_reads_the_same_value(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override
    forms = [f"other,{value}"] if value == "null" else [f"other,{value}", f"choice(other,{value})"]
    for form in forms:  # Hydra itself has no null in choice()
        parameter = only(f"key={form}")
        assert read(parameter.override(parameter.grid[1])).value() == read(f"key={value}").value()


def test_numbers_are_written_with_all_their_digits():
    parameter = only("key=interval(0,1)")
    assert parameter.override(0.1 + 0.2) == "key=0.30000000000000004"
    assert parameter.override(1e-7) == "key=1e-07"


def test_options_of_a_group_by_pattern():
    class Loader:
        def get_group_options(self, group, results_filter=None):
            return ["reviews", "tldr", "tulu"]

    assert only("dataset=glob(t*)", loader=Loader()).grid == ["tldr", "tulu"]


@pytest.mark.parametrize(
    ("words", "settings", "problems"),
    [
        (["a=tag(log, interval(0, 1))"], {}, ["a=tag(log, interval(0, 1)): *low*"]),
        (["a=tag(log, range(1, 9))"], {}, ["a=tag(log, range(1, 9)): log is for intervals: tag(log, interval(...))"]),
        (["a=interval(2, 1)", "b=range(5,1,step=-1)"], {}, ["a=interval(2, 1): it ends *", "b=*: it ends *"]),
        (["a=interval(0, inf)"], {}, ["a=interval(0, inf): its ends must be finite"]),
        (["a=interval(0,"], {}, ["cannot read 'a=interval(0,': a bracket is not closed*"]),
        ([], {"search_space": {"a": {"type": "real"}}}, [f"{OLD}.a: needs a type, one of int, float or categorical"]),
        ([], {"search_space": {"a": {"type": "int", "low": 0}}}, [f"{OLD}.a: needs low and high"]),
        ([], {"search_space": {"a": {"type": "int", "lo": 0}}}, [f"{OLD}.a: unknown lo"]),
        ([], {"search_space": {"a": {"type": "categorical"}}}, [f"{OLD}.a: needs choices"]),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_said_in_a_line(words, settings, problems):
    from fnmatch import fnmatch

    with pytest.raises(InputError) as error:
        _space.read(words, **settings)
    assert len(error.value.problems) == len(problems)
    for said, expected in zip(error.value.problems, problems, strict=True):
        assert said == expected or fnmatch(said, expected), said
        assert "\n" not in said
