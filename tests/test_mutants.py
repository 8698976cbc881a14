"""The mutation check's own parts: which mutants there are, how they are applied, the list of equivalent ones."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import EQUIVALENT, ROOT, equivalent
from tests.mutation import mutants


def changed(source: str) -> set[str]:
    """What each mutant makes of an expression or statement."""
    found = []
    for i in range(len(mutants(ast.parse(source)))):
        tree = ast.parse(source)
        mutants(tree)[i].apply()
        found.append(ast.unparse(ast.fix_missing_locations(tree)))
        compile(ast.fix_missing_locations(tree), "mutant", "exec")
    return set(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a + b", {"a - b"}),
        ("a - b * c", {"a + b * c", "a - b / c"}),
        ("a & ~b", {"a | ~b", "a & b"}),
        ("a < b", {"a <= b", "a >= b"}),
        ("a >= b", {"a > b", "a < b"}),
        ("a <= b < c", {"a < b < c", "a > b < c", "a <= b <= c", "a <= b >= c"}),
        ("a == b and c is d", {"a == b or c is d", "a != b and c is d", "a == b and c is not d"}),
        ("x = 0.5", {"x = 1.0"}),
        ("x = 3", {"x = 4", "x = 2"}),
        ("x = True", {"x = False"}),
        ("x = -1.0", {"x = 1.0", "x = -2.0", "x = -0.0"}),
        ("x[1:]", {"x[:-1]", "x[:]", "x[2:]", "x[0:]"}),
        ("z = min(a, b)", {"z = max(a, b)"}),
        ("z = x.any()", {"z = x.all()", "z = x"}),
        ("z = x.detach()", {"z = x"}),
        ("z = x.clamp(min=a)", {"z = x.clamp()", "z = x"}),
        ("z = torch.where(m, x, y)", {"z = x", "z = y", "z = torch.where(m, y, x)"}),
        ("if a:\n    raise E('a < 1')", {"if a:\n    pass", "if not a:\n    raise E('a < 1')"}),
        ("with no_grad():\n    a", {"if True:\n    a"}),
        ("@no_grad()\ndef f():\n    return a", {"def f():\n    return a"}),
        ("@staticmethod\ndef f():\n    return a", set()),
        ("def f(x: int | None = None, *, y: float = 1.0) -> int | str:\n    '''1 < 2'''", {"2.0", "0.0"}),
        ("check_shapes(x=(x, 'B'))", {"pass"}),
        ("a if b else c", {"c if b else a"}),
        ("x *= a", {"x /= a"}),
    ],
)
def test_mutants_by_hand(source, expected):
    found = changed(source)
    if source.startswith("def f(x"):  # the defaults alone
        found = {text.split("y: float=")[1].split(")")[0] for text in found}
    assert found == expected


def test_names_say_the_function_and_number_equal_changes():
    source = "def f(x):\n    return x + 1, x + 1\n\nclass C:\n    def g(self):\n        return -a"
    names = [mutant.name for mutant in mutants(ast.parse(source))]
    assert names == [
        *("f: x + 1 -> x - 1", "f: 1 -> 2", "f: 1 -> 0"),
        *("f: x + 1 -> x - 1 (2)", "f: 1 -> 2 (2)", "f: 1 -> 0 (2)"),
        "C.g: -a -> a",
    ]


def test_a_reason_holds_for_the_names_above_it(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# said\n\na.f: 1 -> 2\na.f: 1 -> 0\n    one\nb.g: x -> y\n    two\n")
    assert equivalent(path) == {"a.f: 1 -> 2": "one", "a.f: 1 -> 0": "one", "b.g: x -> y": "two"}
    path.write_text("a.f: 1 -> 2\n")
    with pytest.raises(ValueError, match="no reason"):
        equivalent(path)


def test_the_committed_list_is_readable():
    assert len(equivalent(ROOT / EQUIVALENT)) > 10
