"""Conditions of a search space, such as `lora.init_lora_weights == 'pissa' and lora.r > 4`.

They are read as Python expressions and evaluated node by node: nothing but keys, constants, comparisons and and/or/not.
"""

import ast
import operator
from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

WORDS = {"true": True, "false": False, "null": None}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


@cache
def parse(text: str) -> ast.expr:
    """Return the expression. Raises ValueError with what it must not hold."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("is not an expression") from error
    _check(tree)
    return tree


def keys(text: str) -> list[str]:
    """Return the config keys that a condition names, each once."""
    return list(dict.fromkeys(_keys(parse(text))))


def holds(text: str, value: Callable[[str], Any]) -> bool:
    """Return whether a condition holds where `value` gives what a key has. Unlike types have no order: false."""
    return bool(_evaluate(parse(text), value))


def compared(text: str) -> list[tuple[str, Any]]:
    """Return the pairs of a key and a constant that == or `in` compares."""
    found = []
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.In) and _is_key(node.left):
            right = node.comparators[0]
            options = right.elts if isinstance(right, ast.Tuple | ast.List | ast.Set) else [right]
            found += [(_dotted(node.left), _constant(o)) for o in options if not _is_key(o)]
    return found


def _check(node: ast.expr) -> None:
    match node:
        case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            for part in parts:
                _check(part)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=part):
            _check(part)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(o) in COMPARISONS for o in ops):
            for part in (left, *others):
                _check(part)
        case ast.Constant(value=None | bool() | int() | float() | str()):
            pass
        case ast.Name():
            pass
        case ast.Attribute(value=ast.Name() | ast.Attribute() as inner):
            _check(inner)
        case _:
            raise ValueError(f"may hold keys, constants, comparisons, and, or, not; not `{ast.unparse(node)}`")


def _is_key(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node.id.lower() not in WORDS)


def _dotted(node: ast.expr) -> str:
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _constant(node: ast.expr) -> Any:
    return _evaluate(node, lambda key: key)


def _keys(node: ast.expr) -> list[str]:
    if _is_key(node):
        return [_dotted(node)]
    inside = (_keys(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
    return list(chain.from_iterable(inside))


def _evaluate(node: ast.expr, value: Callable[[str], Any]) -> Any:
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_evaluate(part, value) for part in node.values)
        case ast.BoolOp():
            return any(_evaluate(part, value) for part in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _evaluate(node.operand, value)
        case ast.UnaryOp():
            return -_evaluate(node.operand, value)
        case ast.Compare():
            return _compare(node, value)
        case ast.Constant():
            return node.value
        case ast.Tuple() | ast.List() | ast.Set():
            return [_evaluate(part, value) for part in node.elts]
        case ast.Name() if node.id.lower() in WORDS:
            return WORDS[node.id.lower()]
    return value(_dotted(node))


def _compare(node: ast.Compare, value: Callable[[str], Any]) -> bool:
    left = _evaluate(node.left, value)
    for op, comparator in zip(node.ops, node.comparators, strict=True):
        right = _evaluate(comparator, value)
        try:
            if not COMPARISONS[type(op)](left, right):
                return False
        except TypeError:
            return False
        left = right
    return True
