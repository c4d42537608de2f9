"""What an action is: values that an author writes or an operator makes.

Invariants: frozen, plain JSON, the same digest for the same content; checked on creation; no secret (those stay in the
connection); nothing heavy is imported here, so a DAG file may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from airflow_ai_provider.core.batch import digest_of
from airflow_ai_provider.errors import SpecError

METHODS = ("POST", "PUT", "PATCH", "DELETE")
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Undo:
    """How one effect is undone.

    :param method: HTTP method.
    :param endpoint: path at the same host; ``{id}`` and the like are fields of the answer that the action got.
    """

    method: str = "DELETE"
    endpoint: str = "/{id}"

    def __post_init__(self) -> None:
        _check("undo", self.method, self.endpoint)

    @classmethod
    def of(cls, value: Undo | Mapping[str, str] | None) -> Undo | None:
        """Read what an author may write: an ``Undo``, ``{"delete": "/tickets/{id}"}``, or None.

        :raises SpecError: when it is neither; a retry does not help.
        """
        if value is None or isinstance(value, Undo):
            return value
        calls = {str(method).upper(): path for method, path in value.items()} if isinstance(value, Mapping) else {}
        if set(calls) == {"METHOD", "ENDPOINT"}:
            return cls(calls["METHOD"].upper(), calls["ENDPOINT"])
        if len(calls) != 1:
            raise _fault("undo", f"{value!r} is not one call; write {{'delete': '/tickets/{{id}}'}}")
        return cls(*next(iter(calls.items())))


@dataclass(frozen=True)
class HttpAction:
    """One outside effect per row, through an HTTP API.

    :param name: which effect it is; part of every idempotency key, so a renamed action is a new effect.
    :param endpoint: path at the sender's host; ``{column}`` is filled from the row.
    :param method: HTTP method.
    :param json: text of the body's template (``template.py``); None sends the row's own columns.
    :param undo: how one effect is undone; None: it cannot be.
    :param max_refused: share (below 1) or count of rows that may be refused; None for no limit.
    """

    name: str
    endpoint: str
    method: str = "POST"
    json: str | None = None
    undo: Undo | None = None
    max_refused: float | int | None = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise _fault("name", "is empty; an action's name is part of every idempotency key")
        _check("endpoint", self.method, self.endpoint)

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides what is sent."""
        return digest_of(self.to_dict())

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """Fields of an answer that the undo will need."""
        return tuple(_FIELD.findall(self.undo.endpoint)) if self.undo else ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def fill(endpoint: str, values: Mapping[str, Any]) -> str:
    """Fill ``{name}`` in a path; each value is quoted so that it stays one segment of the path.

    :raises SpecError: when a value is missing, empty or would change the path (``..``): a DELETE of ``/tickets/`` in
        place of ``/tickets/7`` could remove all of them; a retry does not help.
    """

    def one(match: re.Match[str]) -> str:
        value = values.get(match[1])
        text = "" if value is None or isinstance(value, bool | list | dict) else str(value)
        if text.strip() in ("", ".", ".."):
            raise _fault(
                "endpoint", f"{endpoint} needs {match[1]!r}, which is {value!r} here; it must be a text or a number"
            )
        return quote(text, safe="")

    return _FIELD.sub(one, endpoint) if "{" in endpoint else endpoint


def _check(where: str, method: str, endpoint: str) -> None:
    if method not in METHODS:
        raise _fault(where, f"method {method!r} is not one of {', '.join(METHODS)}")
    if not endpoint.startswith("/") or endpoint.startswith("//") or any(c.isspace() for c in endpoint):
        raise _fault(where, f"{endpoint!r} is not a path; write '/tickets': the host comes from the connection")


def _fault(where: str, what: str) -> SpecError:
    return SpecError(f"action {where}: {what}.", faults=[(where, what)])
