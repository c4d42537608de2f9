"""What every sender of actions promises.

Invariants: a sender never guesses: what it calls done or refused the receiver has said, what it calls later surely did
not happen, and everything else is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

STATES = ("done", "refused", "later", "unknown")


@dataclass(frozen=True)
class Request:
    """One effect to ask for.

    :param key: idempotency key, sent along.
    :param path: at the sender's address, filled and quoted.
    :param body: JSON text in UTF-8; None sends no body.
    """

    key: str
    method: str
    path: str
    body: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    :param state: ``done``; ``refused`` (for good, nothing was done); ``later`` (surely nothing was done); ``unknown``
        (it left, and no whole answer came).
    :param status: the receiver's status code; 0 when there was none.
    :param body: the answer's fields, when it was a JSON object.
    :param reason: why it is not done, short, without secrets.
    """

    state: Literal["done", "refused", "later", "unknown"]
    status: int = 0
    body: dict[str, Any] | None = None
    reason: str = ""


@runtime_checkable
class Sender(Protocol):
    """Ask for effects and classify the answers. Safe to call from several threads."""

    @property
    def address(self) -> str:
        """Where requests go, without credentials: an undo goes only where its action went."""

    def send(self, requests: Sequence[Request]) -> list[Answer]:
        """Send requests concurrently.

        :return: one answer per request, in order; nothing is raised for what a receiver does.
        """

    def close(self) -> None:
        """Give connections back; a later ``send`` opens them again."""
