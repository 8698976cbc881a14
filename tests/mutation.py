"""Small wrong versions of a module: one sign, bound, mask, constant or check changed at a time.

`mutants(source)` lists them; each is applied to its syntax tree in place, so a process can apply one. Annotations,
docstrings and the text of errors are left alone.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS = {  # the bound moved, and the other side
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
SWAPPED = (("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("any", "all"))
NAMES = {a: b for pair in SWAPPED for a, b in (pair, pair[::-1])}
STRUCTURAL = ("staticmethod", "classmethod", "property")  # decorators without which nothing can be called


@dataclass
class Mutant:
    """One change: `owner.field` (or its `index`) becomes `new`."""

    where: str  # function, or "" at module level
    line: int
    before: str
    after: str
    owner: ast.AST
    field: str
    index: int | None
    new: ast.AST | None  # None: the element is dropped
    count: int = 1  # which one, of equal changes in a function

    @property
    def name(self) -> str:
        """The same however lines move; equal changes in one function are numbered."""
        number = f" ({self.count})" if self.count > 1 else ""
        return f"{self.where}: {self.before} -> {self.after}{number}".removeprefix(": ")

    def apply(self) -> None:
        if self.index is None:
            setattr(self.owner, self.field, self.new)
        elif self.new is None:
            del getattr(self.owner, self.field)[self.index]
        else:
            getattr(self.owner, self.field)[self.index] = self.new


def mutants(tree: ast.Module) -> list[Mutant]:
    """All mutants of a module, in the order of its text; each refers to nodes of `tree`."""
    found, seen = list(_walk(tree, "")), Counter()
    for mutant in found:
        seen[mutant.name] += 1
        mutant.count = seen[mutant.name]
    return found


def _walk(owner: ast.AST, where: str) -> Iterator[Mutant]:
    for field, value in ast.iter_fields(owner):
        if field in ("annotation", "returns", "type_params") or isinstance(owner, ast.JoinedStr):
            continue
        elements = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, node in elements:
            if not isinstance(node, ast.AST):
                continue
            for new in _changes(node, field):
                before, after = _line(node), _line(new) if new is not None else "(dropped)"
                yield Mutant(where, getattr(node, "lineno", 0), before, after, owner, field, index, new)
            if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom) or _is_shape_check(node):
                continue
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            yield from _walk(node, f"{where}.{node.name}".removeprefix(".") if named else where)


def _line(node: ast.AST) -> str:
    """What stands in a mutant's name: of a compound statement its first line."""
    return ast.unparse(node).split("\n")[0]


def _changes(node: ast.AST, field: str) -> Iterator[ast.AST | None]:
    """What may stand in the place of `node`; None drops it."""
    if field == "decorator_list":
        if ast.unparse(node) not in STRUCTURAL:
            yield None
    elif isinstance(node, ast.stmt):
        yield from _statements(node)
    elif isinstance(node, ast.keyword):
        yield None
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, _constants(node.value))
    elif isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC:
            yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                yield ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Slice):
        yield from _slices(node)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Name | ast.Attribute):
        yield from _names(node)


def _statements(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    elif isinstance(node, ast.If) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.With):
        yield ast.If(ast.Constant(True), node.body, [])
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)


def _constants(value: object) -> tuple:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return value + 1, value - 1
    if isinstance(value, float):
        return {0.0: (1.0,), 0.5: (1.0,), 1.0: (2.0, 0.0)}.get(value, (2 * value,))
    return ()  # texts, None, ...


def _slices(node: ast.Slice) -> Iterator[ast.AST]:
    bounds = (node.lower and ast.unparse(node.lower), node.upper and ast.unparse(node.upper))
    if bounds == ("1", None):
        yield ast.Slice(None, ast.Constant(-1), node.step)
    elif bounds == (None, "-1"):
        yield ast.Slice(ast.Constant(1), None, node.step)
    if node.lower:
        yield ast.Slice(None, node.upper, node.step)
    if node.upper:
        yield ast.Slice(node.lower, None, node.step)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    if ast.unparse(node.func) == "torch.where" and len(node.args) == 3:
        yield from node.args[1:]
        yield ast.Call(node.func, [node.args[0], *node.args[:0:-1]], node.keywords)
    elif isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
        yield node.func.value  # x.detach() -> x, x.masked_fill(...) -> x
    elif len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
        yield node.args[0]  # at_least_float32(x) -> x


def _names(node: ast.Name | ast.Attribute) -> Iterator[ast.AST]:
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)


def _is_module(node: ast.AST) -> bool:
    """Whether `node` is what functions are taken from by name: `torch`, `F`, `torch.special`, a class, `cls`."""
    text = ast.unparse(node)
    return text.split(".")[0] in ("torch", "F", "cls", "ctx") or text[:1].isupper()


def _is_shape_check(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("check_shapes(")
