"""A fallback rule: a small expression over a row's columns, such as ``worst_radius > 16.8 and site == "left"``.

Invariants: only comparisons, ``in``, ``and``/``or``/``not``, ``+ - * /``, numbers, texts and column names are allowed
(``col("worst radius")`` names a column whose name is no word); nothing is ever executed as Python. All faults are
found when the rule is written, with their position. A rule over a missing value (null, NaN, a division by zero) has
no answer, which is null, never false. Arithmetic is done in 64-bit floats.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LENGTH = 1000
_COMPARE = {
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_MEMBER = (ast.In, ast.NotIn)
_ALLOWED = "Allowed: column names, numbers, texts, < <= > >= == !=, in [...], and, or, not, + - * /."
NUMBER, TEXT, TRUTH, COLUMN = "a number", "text", "yes or no", "a column"


def find_faults(rule: str) -> list[str]:
    """List every fault of a rule, each with its position; an empty list means that it can be run.

    :param rule: the rule as written.
    """
    if not isinstance(rule, str) or not rule.strip():
        return [f"{rule!r} is not a rule. Write a question about a row, such as worst_radius > 16.8"]
    if len(rule) > MAX_LENGTH:
        return [f"the rule has {len(rule)} characters, {MAX_LENGTH} are allowed. Compute a column upstream instead"]
    try:
        tree = _parse(rule)
    except SyntaxError as error:
        return [f"column {error.offset or 1}: {error.msg}. {_ALLOWED}"]
    except (ValueError, RecursionError, MemoryError) as error:
        return [f"the rule cannot be read: {error}. {_ALLOWED}"]
    faults: list[str] = []
    if _kind(tree, rule, faults) in (NUMBER, TEXT) and not faults:
        faults.append(f"{rule!r} is not a yes-or-no question. Compare it with something, such as {rule} > 0")
    return faults


def columns_of(rule: str) -> list[str]:
    """Return the names of the columns that a rule reads, in the order of writing."""
    return list(dict.fromkeys(_named(_parse(rule))))


def answer(rule: str, rows: pa.Table) -> pa.ChunkedArray:
    """Answer a rule for every row.

    :param rule: a rule without faults.
    :param rows: any number of rows; must have the columns that the rule reads.
    :return: boolean column of the same length; null where a value is missing.
    :raises SpecError: when a column is not there or of a type that the rule cannot compare; a retry does not help.
    """
    import pyarrow as pa

    for name in columns_of(rule):
        if name not in rows.column_names:
            raise _misfit(rule, f"there is no column {name!r}; the rows have {', '.join(rows.column_names)}")
    value = _Answer(rule, rows).of(_parse(rule))
    if value.kind != TRUTH:
        raise _misfit(rule, f"it gives {value.kind}, not yes or no; compare it with something")
    if isinstance(value.data, pa.Scalar):
        return pa.chunked_array([pa.repeat(value.data, rows.num_rows)])
    return value.data


def _parse(rule: str) -> ast.expr:
    return ast.parse(rule.strip(), mode="eval").body


def _named(node: ast.expr) -> Iterator[str]:
    name = _column(node)
    if name is not None:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield from _named(child)


def _column(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    match node:
        case ast.Call(ast.Name("col"), [ast.Constant(str(name))], []):
            return name
    return None


def _fault(node: ast.AST, rule: str, what: str) -> str:
    # ast counts UTF-8 bytes; an author counts characters
    before = rule.strip().encode()[: getattr(node, "col_offset", 0)].decode(errors="ignore")
    return f"column {len(before) + 1}: {what}"


def _kind(node: ast.expr, rule: str, faults: list[str]) -> str:
    """Return what an expression gives, adding every fault in it."""
    if _column(node) is not None:
        return COLUMN
    if isinstance(node, ast.Constant):
        return _kind_of_constant(node, rule, faults)
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _demand(part, (TRUTH, COLUMN), rule, faults)
        return TRUTH
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        negates = isinstance(node.op, ast.USub)
        _demand(node.operand, (NUMBER, COLUMN) if negates else (TRUTH, COLUMN), rule, faults)
        return NUMBER if negates else TRUTH
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        for part in (node.left, node.right):
            _demand(part, (NUMBER, COLUMN), rule, faults)
        return NUMBER
    if isinstance(node, ast.Compare):
        return _kind_of_comparison(node, rule, faults)
    faults.append(_fault(node, rule, f"{ast.unparse(node)!r} is not allowed in a rule. {_ALLOWED}"))
    return COLUMN


def _kind_of_constant(node: ast.Constant, rule: str, faults: list[str]) -> str:
    value = node.value
    if isinstance(value, bool):
        return TRUTH
    if isinstance(value, str):
        return TEXT
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return NUMBER
    if isinstance(value, float) and math.isfinite(value):
        return NUMBER
    faults.append(_fault(node, rule, f"{ast.unparse(node)} is not a number of 64 bits, a text, True or False"))
    return COLUMN


def _kind_of_comparison(node: ast.Compare, rule: str, faults: list[str]) -> str:
    left = _kind(node.left, rule, faults)
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        if isinstance(op, _MEMBER):
            right = _kind_of_list(right_node, rule, faults)
        elif type(op) in _COMPARE:
            right = _kind(right_node, rule, faults)
        else:
            faults.append(_fault(right_node, rule, f"'is' is not allowed in a rule; use == or !=. {_ALLOWED}"))
            continue
        if COLUMN not in (left, right) and left != right:
            faults.append(_fault(right_node, rule, f"{left} is compared with {right}, which are never alike"))
        left = right
    return TRUTH


def _kind_of_list(node: ast.expr, rule: str, faults: list[str]) -> str:
    items = node.elts if isinstance(node, ast.List | ast.Tuple) else []
    kinds = {_kind(item, rule, faults) for item in items if isinstance(item, ast.Constant)}
    if not items or len(kinds) != 1 or not all(isinstance(item, ast.Constant) for item in items):
        faults.append(_fault(node, rule, 'after in comes a list of texts or of numbers, such as ["left", "right"]'))
        return COLUMN
    return kinds.pop()


def _demand(node: ast.expr, kinds: tuple[str, ...], rule: str, faults: list[str]) -> None:
    found = _kind(node, rule, faults)
    if found not in kinds:
        faults.append(_fault(node, rule, f"{ast.unparse(node)!r} is {found}; {kinds[0]} is needed here"))


def _misfit(rule: str, what: str) -> SpecError:
    message = f"fallback rule {rule!r} does not fit the rows: {what}. Correct the rule in the policy."
    return SpecError(message, faults=[("fallback.rule", what)])


class _Value:
    """An Arrow scalar or column, and what it holds."""

    def __init__(self, kind: str, data: Any) -> None:
        self.kind, self.data = kind, data


class _Answer:
    """Evaluate one parsed rule over one table with Arrow's kernels."""

    def __init__(self, rule: str, rows: pa.Table) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.rule, self.rows, self.pa, self.pc = rule, rows, pa, pc

    def of(self, node: ast.expr) -> _Value:
        name = _column(node)
        if name is not None:
            return self.column(name)
        if isinstance(node, ast.Constant):
            return _Value(_kind_of_constant(node, self.rule, []), self.pa.scalar(node.value))
        if isinstance(node, ast.BoolOp):
            return self.junction(node)
        if isinstance(node, ast.UnaryOp):
            return self.negation(node)
        if isinstance(node, ast.BinOp):
            return self.arithmetic(node)
        assert isinstance(node, ast.Compare)  # find_faults lets nothing else through
        return self.comparison(node)

    def column(self, name: str) -> _Value:
        pa, data = self.pa, self.rows.column(name)
        if pa.types.is_dictionary(data.type):
            data = data.cast(data.type.value_type)
        if pa.types.is_boolean(data.type):
            return _Value(TRUTH, data)
        if pa.types.is_string(data.type) or pa.types.is_large_string(data.type):
            return _Value(TEXT, data.cast(pa.string()))
        if pa.types.is_null(data.type):
            return _Value(COLUMN, data)
        if pa.types.is_integer(data.type):
            return _Value(NUMBER, data)
        if pa.types.is_floating(data.type) or pa.types.is_decimal(data.type):
            return _Value(NUMBER, self.without_nan(data.cast(pa.float64(), safe=False)))
        raise _misfit(self.rule, f"column {name!r} is {data.type}; a rule reads numbers, texts and yes or no")

    def without_nan(self, data: Any) -> Any:
        return self.pc.if_else(self.pc.is_finite(data), data, self.pa.scalar(None, self.pa.float64()))

    def demand(self, node: ast.expr, kind: str) -> Any:
        value = self.of(node)
        if value.kind not in (kind, COLUMN):
            raise _misfit(self.rule, f"{ast.unparse(node)!r} is {value.kind}; {kind} is needed there")
        return value.data.cast(self.pa.bool_() if kind == TRUTH else self.pa.float64(), safe=False)

    def junction(self, node: ast.BoolOp) -> _Value:
        join = self.pc.and_kleene if isinstance(node.op, ast.And) else self.pc.or_kleene
        result = self.demand(node.values[0], TRUTH)
        for part in node.values[1:]:
            result = join(result, self.demand(part, TRUTH))
        return _Value(TRUTH, result)

    def negation(self, node: ast.UnaryOp) -> _Value:
        if isinstance(node.op, ast.Not):
            return _Value(TRUTH, self.pc.invert(self.demand(node.operand, TRUTH)))
        return _Value(NUMBER, self.pc.negate(self.demand(node.operand, NUMBER)))

    def arithmetic(self, node: ast.BinOp) -> _Value:
        left, right = self.demand(node.left, NUMBER), self.demand(node.right, NUMBER)
        return _Value(NUMBER, self.without_nan(getattr(self.pc, _ARITHMETIC[type(node.op)])(left, right)))

    def comparison(self, node: ast.Compare) -> _Value:
        left, result = self.of(node.left), None
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, _MEMBER):
                right, verdict = left, self.member(left, op, right_node)
            else:
                right = self.of(right_node)
                verdict = self.pair(_COMPARE[type(op)], left, right)
            result = verdict if result is None else self.pc.and_kleene(result, verdict)
            left = right
        return _Value(TRUTH, result)

    def pair(self, name: str, left: _Value, right: _Value) -> Any:
        if COLUMN in (left.kind, right.kind):  # a column of nothing but nulls has no answer
            return self.nulls()
        if left.kind != right.kind:
            raise _misfit(self.rule, f"{left.kind} is compared with {right.kind}")
        return getattr(self.pc, name)(*self.alike(left.data, right.data))

    def alike(self, left: Any, right: Any) -> tuple[Any, Any]:
        """Bring two kinds of numbers to one, where Arrow would refuse a value that the other kind cannot hold."""
        number = self.pa.float64()
        if self.pa.types.is_floating(left.type) != self.pa.types.is_floating(right.type):
            return left.cast(number, safe=False), right.cast(number, safe=False)
        if self.pa.types.is_uint64(left.type) != self.pa.types.is_uint64(right.type):
            return left.cast(self.pa.decimal128(20)), right.cast(self.pa.decimal128(20))
        return left, right

    def member(self, left: _Value, op: ast.cmpop, node: ast.expr) -> Any:
        assert isinstance(node, ast.List | ast.Tuple)
        result = self.pair("equal", left, self.of(node.elts[0]))
        for item in node.elts[1:]:
            result = self.pc.or_kleene(result, self.pair("equal", left, self.of(item)))
        return self.pc.invert(result) if isinstance(op, ast.NotIn) else result

    def nulls(self) -> Any:
        return self.pa.chunked_array([self.pa.nulls(self.rows.num_rows, self.pa.bool_())])
