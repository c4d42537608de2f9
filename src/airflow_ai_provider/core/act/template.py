"""A row → the JSON body of an action.

Invariants: a template sees the row and the run, nothing else (sandboxed); a name that is not there is an error, not an
empty text; what a row holds cannot break out of its JSON string; the result is JSON.

In a template, ``{{ row.name }}`` prints a text with its quotes and backslashes escaped (write the quotes around it),
a number as a number, null, true and false as JSON; ``{{ row | tojson }}`` prints any value whole.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.errors import SpecError

Render = Callable[[Mapping[str, Any]], Any]


def open_template(name: str, text: str | None, run: Mapping[str, Any]) -> Render:
    """Compile a template once; the result renders one row.

    :param name: the action's name, for messages.
    :param text: the template; None renders the row's own columns (those without a leading underscore).
    :param run: what the template sees as ``run``.
    :return: a function from a row to its payload.
    :raises SpecError: when the text is no template; a retry does not help. The function raises it too, for a row that
        the template does not fit.
    """
    if text is None:
        return lambda row: {column: plain(value) for column, value in row.items() if not column.startswith("_")}
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_print, autoescape=False)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["tojson"] = lambda value: _Ready(_dump(plain(value)))
    try:
        template = environment.from_string(text)
    except TemplateSyntaxError as error:
        raise _fault(name, f"line {error.lineno}: {error.message}", "Correct the template file.") from error

    def render(row: Mapping[str, Any]) -> Any:
        where = f"row {row.get(ROW_ID, '?')}"
        try:
            printed = template.render(row={k: plain(v) for k, v in row.items()}, run=run)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            columns = ", ".join(list(row)[:20])
            raise _fault(
                name, f"{where}: {error}", f"The row has {columns}; use | default(…) for what may be missing."
            ) from error
        try:
            return json.loads(printed, parse_constant=_refuse_constant)
        except ValueError as error:
            at = f"{where}: it printed no JSON ({error}): {printed[:120]!r}"
            raise _fault(name, at, "Put quotes around texts, or print the value with | tojson.") from error

    return render


class _Ready(str):
    """JSON text that is printed as it is."""

    __slots__ = ()


def _print(value: Any) -> Any:
    if isinstance(value, _Ready):
        return value
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)[1:-1]
    from jinja2 import Undefined

    return value if isinstance(value, Undefined) else _dump(plain(value))


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Return a row's value as plain JSON: times as ISO text, bytes as base64, NaN and infinity as null.

    :raises SpecError: when it has no JSON form; a retry does not help.
    """
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise SpecError(
        f"a value of type {type(value).__name__} has no JSON form. Leave the column out, or cast it before acting.",
        faults=[("json", f"{type(value).__name__} has no JSON form")],
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _fault(name: str, what: str, then: str) -> SpecError:
    return SpecError(f"template of action {name}: {what}. {then}", faults=[(f"{name}.json", what)])
