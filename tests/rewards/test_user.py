"""python:module.function: found from the working directory, refused or blamed in one line, hashed by content."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.rewards import functions


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module(source, name) writes a module into the working directory, which is a test's own."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    before = set(sys.modules)

    def write(source: str, name: str = "mine") -> Path:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "other", "folder"):
            del sys.modules[name]


def problem(act) -> str:
    with pytest.raises(InputError) as caught:
        act()
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def test_it_is_called_with_lists_and_gives_the_scores(module):
    module("def score(prompts, responses):\n    assert type(prompts) is type(responses) is list\n"
           "    return [len(p) - len(r) for p, r in zip(prompts, responses)]\n")  # fmt: skip
    functions.check("python:mine.score")
    scores = functions.score("python:mine.score", ("abc", "a"), ("a", "abc"))
    assert scores == [2.0, -2.0]
    assert all(type(score) is float for score in scores)


def test_a_module_in_a_folder_and_numbers_of_other_libraries(module):
    module("import numpy, torch\ndef f(prompts, responses):\n    return torch.tensor([1.5, 2.0])\n"
           "def g(prompts, responses):\n    return numpy.array([1, 2])\n"
           "def h(prompts, responses):\n    return (x for x in [True, numpy.float32(0.5)])\n",
           "folder.deep")  # fmt: skip
    for name, scores in (("f", [1.5, 2.0]), ("g", [1.0, 2.0]), ("h", [1.0, 0.5])):
        assert functions.score(f"python:folder.deep.{name}", ["p"] * 2, ["r"] * 2) == scores


@pytest.mark.parametrize(
    ("source", "spec", "line"),
    [
        ("", "mine", "expected python:module.function, got python:mine"),
        ("", "mine.f()", "expected python:module.function, got python:mine.f()"),
        ("", "absent.f", "there is no module absent, neither in HERE nor installed"),
        ("", "mine.deep.f", "there is no module mine.deep, neither in HERE nor installed"),
        ("def f(p, r): ...", "mine.g", "module mine (HERE/mine.py) has no function g"),
        ("f = 3", "mine.f", "f in HERE/mine.py is no function but int"),
        (
            "def f(responses): ...",
            "mine.f",
            "it must be def f(prompts: list[str], responses: list[str]) -> list[float] "
            "(too many positional arguments)",
        ),
        (
            "\nimport absent_library\ndef f(p, r): ...",
            "mine.f",
            "module mine cannot be imported: ModuleNotFoundError: No module named 'absent_library' "
            "(HERE/mine.py, line 2)",
        ),
        (
            "x = 1\nraise RuntimeError('no\\n licence')",
            "mine.f",
            "module mine cannot be imported: RuntimeError: no licence (HERE/mine.py, line 2)",
        ),
        (
            "import sys; sys.exit(3)",
            "mine.f",
            "module mine cannot be imported: SystemExit: 3 (HERE/mine.py, line 1)",
        ),
        (
            "def f(:",
            "mine.f",
            "module mine cannot be imported: SyntaxError: invalid syntax (HERE/mine.py, line 1)",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_loads(module, source, spec, line):
    module(source)
    said = problem(lambda: functions.check(f"python:{spec}"))
    assert said.replace(str(Path.cwd()), "HERE") == f"reward_source.function=python:{spec}: {line}"


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("return [1.0]", "returned 1 scores for 2 responses"),
        ("return [1.0, 2.0, 3.0]", "returned 3 scores for 2 responses"),
        ("return None", "must return a list of numbers, returned None"),
        ("return 0.5", "must return a list of numbers, returned 0.5"),
        ("return [1.0, None]", "must return finite numbers, returned None at place 1, for 'second'"),
        ("return [float('nan'), 1]", "must return finite numbers, returned nan at place 0, for 'first'"),
        ("return [1, -float('inf')]", "must return finite numbers, returned -inf at place 1, for 'second'"),
        ("return ['1', '2']", "must return finite numbers, returned '1' at place 0, for 'first'"),
        ("return '12'", "must return finite numbers, returned '1' at place 0, for 'first'"),
        ("return [[1], [2]]", "must return finite numbers, returned [1] at place 0, for 'first'"),
        ("raise KeyError(responses[1])", "raised KeyError: 'second' (HERE/mine.py, line 2)"),
        ("import json; json.loads('{')", None),
    ],
)
def test_a_function_that_fails_is_named(module, body, line):
    module(f"def f(prompts, responses):\n    {body}\n")
    said = problem(lambda: functions.score("python:mine.f", ["p", "p"], ["first", "second"]))
    if line is None:
        assert said.startswith("python:mine.f: raised JSONDecodeError: Expecting property name")
        return
    assert said.replace(str(Path.cwd()), "HERE") == f"python:mine.f: {line}"


def test_the_fingerprint_is_of_the_source(module):
    path = module("def f(p, r):\n    return [0.0] * len(r)\n")
    first = functions.fingerprint("python:mine.f")
    assert functions.fingerprint("python:mine.f") == first
    path.write_text("def f(p, r):\n    return [1.0] * len(r)\n")
    assert functions.fingerprint("python:mine.f") != first


def test_the_fingerprint_is_also_of_where_the_function_comes_from(module):
    module("from other import f\n")
    other = module("def f(p, r):\n    return [0.0] * len(r)\n", "other")
    first = functions.fingerprint("python:mine.f")
    other.write_text("def f(p, r):\n    return [2.0] * len(r)\n")
    assert functions.fingerprint("python:mine.f") != first
