"""What the source of a forward says that no proxy can see."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any

# asked about a proxy, these answer for the proxy and not for the tensor
_QUESTIONS = frozenset(
    ("isinstance", "issubclass", "type", "hasattr", "callable", "id", "is_tensor")
)


def rest_of(code: types.CodeType) -> str:
    """The name of a function's ``**kwargs``; empty if it has none."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return ""
    before = code.co_argcount + code.co_kwonlyargcount
    return code.co_varnames[before + bool(code.co_flags & inspect.CO_VARARGS)]


class _Source(ast.NodeVisitor):
    """Searches a function for what a trace gets wrong without noticing."""

    def __init__(self, code: types.CodeType, absent: tuple[str, ...] | None) -> None:
        self.own = absent is not None  # the next function is what its decorators have given back
        self.absent = absent or ()
        self.first = code.co_varnames[0] if code.co_argcount else ""
        self.rest = rest_of(code)
        self.refusals: list[str] = []

    def _rooted(self, node: ast.AST) -> bool:
        """Whether an expression is self.a.b[c]: the model's own structure, not an argument."""
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self.first == "self"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        decorators, self.own = [] if self.own else node.decorator_list, False
        for decorator in decorators:
            if not (
                isinstance(decorator, ast.Name)
                and decorator.id in ("property", "staticmethod", "classmethod")
            ):
                self.refusals.append(f"{node.name} is decorated with {ast.unparse(decorator)}")
        for statement in node.body:
            self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "training":
            self.refusals.append("its forward reads training, which a trace would freeze")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        identity = any(isinstance(test, (ast.Is, ast.IsNot)) for test in node.ops)
        if (
            _asks_for_none(node) not in self.absent
            and identity
            and not any(self._rooted(side) for side in sides)
        ):
            self.refusals.append(f"its forward tests {ast.unparse(node)!r}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == self.rest:
            self.refusals.append(f"its forward looks into **{node.id}")

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is not None or getattr(node.value, "id", "") != self.rest:
            self.generic_visit(node)  # f(**kwargs) hands all of it on, unseen

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in _QUESTIONS and not (node.args and self._rooted(node.args[0])):
            self.refusals.append(f"its forward asks {ast.unparse(node)!r}")
        self.generic_visit(node)

    def _refuse(self, node: ast.AST) -> None:
        self.refusals.append(
            f"its forward has a {type(node).__name__.removeprefix('Async').lower()} statement"
        )

    visit_With = visit_AsyncWith = visit_Try = visit_TryStar = visit_Match = visit_Yield = (
        visit_YieldFrom
    ) = _refuse
    visit_Global = visit_Nonlocal = visit_Await = _refuse


def _asks_for_none(node: ast.AST) -> str:
    """The name in ``name is None`` and ``name is not None``; empty for all else."""
    if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Name)):
        return ""
    test, other = node.ops[0], node.comparators[0]
    none = isinstance(other, ast.Constant) and other.value is None and len(node.ops) == 1
    return node.left.id if none and isinstance(test, (ast.Is, ast.IsNot)) else ""


def tested_for_none(forward: Any) -> tuple[str, ...]:
    """The arguments that are None by default, and that a forward asks whether they are; none that
    it gives another value, which may be None or not when it asks."""
    parameters = inspect.signature(forward).parameters.values()
    optional = {parameter.name for parameter in parameters if parameter.default is None}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    nodes = list(ast.walk(tree))
    stored = {
        node.id
        for node in nodes
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    asked = dict.fromkeys(_asks_for_none(node) for node in nodes)
    return tuple(name for name in asked if name in optional - stored)


def unsafe_source(code: types.CodeType, absent: tuple[str, ...] | None) -> list[str]:
    """Why a function that a trace entered cannot be trusted.

    Of the forward itself ``absent`` are the arguments that were None, for others it is None. The
    forward stands for itself where it has decorators: one that wraps it would have given another.
    """
    if (
        code.co_name.startswith("<") and code.co_name != "<lambda>"
    ):  # a comprehension: part of its function's source
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return [f"the source of {code.co_name} is not available"]
    scan = _Source(code, absent)
    scan.visit(tree)
    return scan.refusals
