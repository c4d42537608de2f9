"""A receiver and its sender in one, for tests: behaves as scripted, and remembers what really happened.

Invariants: honours idempotency keys (the same key gets its first answer again, and the effect happens once); counts
every effect, so a test can show that nothing happened twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from airflow_ai_provider.core.act.sender import Answer, Request

Script = Callable[[Request, int], str]
"""A request and how often its key has come (from 1) → what happens, a word of :data:`WORDS`."""

WORDS = ("done", "refused", "later", "lost", "unheard")
"""``lost``: it is done and the answer never comes; ``unheard``: it is not done and no answer comes."""


class ScriptedSender:
    """Send to a receiver that does what a script says.

    :param script: says what happens to each request; without one all are done.
    :param address: where it pretends to be.
    :param honours_keys: False for a receiver that does an effect again for every request that reaches it.
    """

    def __init__(
        self, script: Script | None = None, *, address: str = "http://receiver.test", honours_keys: bool = True
    ) -> None:
        self.address = address
        self.requests: list[Request] = []
        self.effects: dict[str, int] = {}
        self.closed_count = 0
        self._script, self._honours_keys = script, honours_keys
        self._lock = threading.Lock()
        self._first: dict[str, tuple[tuple[str, str, bytes | None], Answer]] = {}
        self._came: dict[str, int] = {}

    def send(self, requests: Sequence[Request]) -> list[Answer]:
        with self._lock:
            return [self._answer(request) for request in requests]

    def close(self) -> None:
        self.closed_count += 1

    def bodies(self) -> list[Any]:
        """Return the bodies of all requests, in the order of their coming."""
        return [json.loads(r.body) if r.body else None for r in self.requests]

    def _answer(self, request: Request) -> Answer:
        self.requests.append(request)
        came = self._came[request.key] = self._came.get(request.key, 0) + 1
        word = self._script(request, came) if self._script else "done"
        if word not in WORDS:
            raise ValueError(f"the script said {word!r}; it may say {', '.join(WORDS)}")
        if word == "later":
            return Answer("later", 503, None, "503: scripted to be busy")
        if word == "unheard":
            return Answer("unknown", 0, None, "scripted not to answer")
        answer = self._do(request, word)
        return Answer("unknown", 0, None, "scripted to lose the answer") if word == "lost" else answer

    def _do(self, request: Request, word: str) -> Answer:
        content = (request.method, request.path, request.body)
        known = self._first.get(request.key) if self._honours_keys else None
        if known:
            return known[1] if known[0] == content else Answer("refused", 409, None, "409: key has another payload")
        if word == "refused":
            return Answer("refused", 422, None, "422: scripted to refuse")
        self.effects[request.key] = self.effects.get(request.key, 0) + 1
        answer = Answer("done", 201, {"id": f"T-{request.key[:8]}"})
        self._first[request.key] = (content, answer)
        return answer
