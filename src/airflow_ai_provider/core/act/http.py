"""Actions over HTTP: the one door to aiohttp of this verb.

Invariants: every request carries its ``Idempotency-Key``; only an answer that came whole counts; a cut, a timeout or a
5xx is unknown, never "not done"; what was surely not taken (no connection, 429, 503) is tried again until the
patience is over; redirects are not followed; no credential is in a log, an error or an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from yarl import URL

from airflow_ai_provider.core.act.sender import Answer, Request
from airflow_ai_provider.errors import ActionUnavailableError, ConnectionConfigError

_ANSWER_LIMIT = 1 << 20
_REASON_LIMIT = 300
_REASON_FIELDS = ("reason", "error", "detail", "message", "title")
# 401, 407: our credentials are wrong, not the row; 408, 425: it did not take the request
_LATER = {401, 407, 408, 425, 429, 503}
_HOPELESS_NOW = {401, 407}


class HttpSender:
    """Send actions to one HTTP API, many at a time.

    Connections are kept open between calls in a thread of its own, so several threads may send through one sender and
    all of them together keep ``in_flight`` requests in flight.

    :param address: ``http://host:port``, with a path before every endpoint if need be.
    :param headers: sent with every request; their values are never shown.
    :param timeout_s: seconds one request may take from start to the last byte; then its outcome is unknown.
    :param connect_timeout_s: seconds to reach the host; then surely nothing was sent.
    :param patience_s: seconds in which a request that was not taken is tried again, with growing pauses.
    :param in_flight: requests at a time.
    """

    def __init__(
        self,
        address: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 10.0,
        patience_s: float = 60.0,
        in_flight: int = 64,
    ) -> None:
        self._url = _check_address(address)
        self._headers = {"Accept": "application/json", **dict(headers or {})}
        if any(c in f"{k}{v}" for k, v in self._headers.items() for c in "\r\n\0"):
            raise ConnectionConfigError("a header of the API connection holds a line break. Correct its extras.")
        # Longest first, so that no tail of a long secret is left when a shorter one is part of it.
        self._secrets = sorted({t for v in (headers or {}).values() for t in _secrets_in(v)}, key=len, reverse=True)
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_timeout_s)
        self._patience_s, self._in_flight = patience_s, in_flight
        self._lock = threading.Lock()
        self._line: _Line | None = None

    @property
    def address(self) -> str:
        """Where requests go, without credentials."""
        return str(self._url)

    def send(self, requests: Sequence[Request]) -> list[Answer]:
        """Send requests concurrently; see :class:`~airflow_ai_provider.core.act.sender.Sender`."""
        line = self._open()
        work = asyncio.run_coroutine_threadsafe(self._send_all(line, requests), line.loop)
        try:
            return work.result()
        except BaseException:
            work.cancel()  # the caller was interrupted: what is in flight stays unknown, as the ledger says
            raise

    def probe(self) -> str:
        """Ask the address for anything; every HTTP answer counts.

        :return: what answered, for a person.
        :raises ActionUnavailableError: when nothing answers; a retry may help.
        """
        line = self._open()
        try:
            status = asyncio.run_coroutine_threadsafe(self._probe(line), line.loop).result()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ActionUnavailableError(
                f"{self.address} does not answer: {self._show(error)}. Check host and port of the connection."
            ) from None
        finally:
            self.close()
        return f"{self.address} answers with {status}"

    def close(self) -> None:
        """Close all connections; a later ``send`` opens them again."""
        with self._lock:
            line, self._line = self._line, None
        if line:
            line.close()

    def _open(self) -> _Line:
        with self._lock:
            if self._line is None:
                self._line = _Line(self._connect, self._work, self._in_flight)
            return self._line

    def _connect(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._in_flight),
            cookie_jar=aiohttp.DummyCookieJar(),  # one row's cookie is not the next one's
            headers=self._headers,
            timeout=self._timeout,
        )

    async def _probe(self, line: _Line) -> int:
        async with line.session.get(self._url, allow_redirects=False) as response:
            return response.status

    async def _send_all(self, line: _Line, requests: Sequence[Request]) -> list[Answer]:
        # One for all: when the host is gone for good, the others do not wait out their own patience one by one.
        errand = _Errand(self._patience_s, len(requests))
        for index, request in enumerate(requests):
            line.waiting.put_nowait(_Item(errand, index, request))
        line.errands.add(errand)
        try:
            await errand.is_through.wait()
        finally:  # the caller was interrupted: what waits is not sent any more
            errand.is_final = True
            line.errands.discard(errand)
        return [answer for answer in errand.answers if answer is not None]

    async def _work(self, line: _Line) -> None:
        """Send what waits, one after the other; ``in_flight`` of these run at a time."""
        while True:
            item = await line.waiting.get()
            try:
                await self._handle(line, item)
            except Exception as error:  # a bug here must not leave a caller waiting for ever
                item.errand.settle(item.index, Answer("unknown", reason=f"not sent well: {self._show(error)}"))

    async def _handle(self, line: _Line, item: _Item) -> None:
        errand = item.errand
        if errand.is_final:
            errand.settle(item.index, Answer("later", reason=errand.reason))
            return
        answer, wait_s = await self._try(line.session, item.request)
        if answer.state != "later":
            errand.goes_on(self._patience_s)
        elif answer.status not in _HOPELESS_NOW:
            wait_s = item.pause_s if wait_s is None else wait_s
            item.pause_s = min(item.pause_s * 2, 5.0)
            if not errand.ends_before(wait_s, answer.reason):
                errand.put_off(item, wait_s, line.waiting)
                return
        errand.settle(item.index, answer)

    async def _try(self, session: aiohttp.ClientSession, request: Request) -> tuple[Answer, float | None]:
        url = URL(f"{self.address.rstrip('/')}{request.path}", encoded=True)
        headers = {"Idempotency-Key": request.key} | ({"Content-Type": "application/json"} if request.body else {})
        try:
            asking = session.request(request.method, url, data=request.body, headers=headers, allow_redirects=False)
            async with asking as got:
                content = await _read(got)
                return self._classify(got, content), _retry_after(got.headers.get("Retry-After"))
        except aiohttp.ClientConnectorError as error:  # refused, no such host, TLS: no byte of the request left
            return Answer("later", reason=f"no connection to {self.address}: {self._show(error)}"), None
        except aiohttp.ConnectionTimeoutError:
            return Answer("later", reason=f"no connection to {self.address} in {self._timeout.sock_connect} s"), None
        except TimeoutError:
            return Answer("unknown", reason=f"no whole answer from {self.address} in {self._timeout.total} s"), None
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            return Answer("unknown", reason=f"the answer of {self.address} was cut: {self._show(error)}"), None

    def _classify(self, got: aiohttp.ClientResponse, content: bytes) -> Answer:
        status, body = got.status, _fields(content)
        reason = self._reason(status, body, content)
        if 200 <= status < 300:
            return Answer("done", status, body)
        if status in _LATER or (status == 409 and "Retry-After" in got.headers):
            return Answer("later", status, None, reason)
        if status >= 500 and status != 501:
            return Answer("unknown", status, None, reason)
        if 300 <= status < 400:
            target = got.headers.get("Location", "elsewhere")
            reason = self._clean(f"{status}: redirects to {target}; set the connection to where it really is")
        return Answer("refused", status, None, reason)

    def _reason(self, status: int, body: dict[str, Any] | None, content: bytes) -> str:
        said = next((body[f] for f in _REASON_FIELDS if body.get(f)), "") if body else ""
        text = said if isinstance(said, str) else json.dumps(said)
        return self._clean(f"{status}: {text or content[: 4 * _REASON_LIMIT].decode('utf-8', 'replace')}")

    def _show(self, error: BaseException) -> str:
        return self._clean(str(error) or type(error).__name__)

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= _REASON_LIMIT else text[: _REASON_LIMIT - 1] + "…"


class _Line:
    """An event loop in a thread, with one session and its workers: connections outlive a single send."""

    def __init__(self, connect: Callable[[], aiohttp.ClientSession], work: Callable[[_Line], Any], count: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.waiting: asyncio.Queue[_Item] = asyncio.Queue()
        self.errands: set[_Errand] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name="http-sender", daemon=True)
        self._thread.start()
        self._workers: list[asyncio.Task[None]] = []
        asyncio.run_coroutine_threadsafe(self._start(connect, work, count), self.loop).result()

    async def _start(
        self, connect: Callable[[], aiohttp.ClientSession], work: Callable[[_Line], Any], count: int
    ) -> None:
        self.session = connect()
        self._workers = [self.loop.create_task(work(self)) for _ in range(count)]

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _stop(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for errand in list(self.errands):
            errand.abandon()
        await self.session.close()


class _Errand:
    """The requests of one send, and what they know together about a receiver that takes nothing."""

    def __init__(self, patience_s: float, count: int) -> None:
        self.answers: list[Answer | None] = [None] * count
        self.is_through = asyncio.Event()
        self.reason = ""
        self.is_final = False
        self._left, self._until = count, time.monotonic() + patience_s
        if not count:
            self.is_through.set()
        self._put_off: dict[int, tuple[asyncio.TimerHandle, _Item, asyncio.Queue[_Item]]] = {}

    def settle(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        self._left -= 1
        if not self._left:
            self.is_through.set()

    def abandon(self) -> None:
        """Let the caller go: what has no answer yet may have left."""
        for index, answer in enumerate(self.answers):
            if answer is None:
                self.settle(index, Answer("unknown", reason="the sender was closed meanwhile"))

    def goes_on(self, patience_s: float) -> None:
        self._until = time.monotonic() + patience_s

    def ends_before(self, wait_s: float, reason: str) -> bool:
        """True when waiting so long would outlast the patience; then nobody waits any more."""
        if time.monotonic() + wait_s >= self._until and not self.is_final:
            self.reason, self.is_final = reason, True
            for timer, item, waiting in list(self._put_off.values()):
                timer.cancel()
                waiting.put_nowait(item)
            self._put_off.clear()
        return self.is_final

    def put_off(self, item: _Item, wait_s: float, waiting: asyncio.Queue[_Item]) -> None:
        """Let a request wait without holding a connection."""

        def back() -> None:
            del self._put_off[item.index]
            waiting.put_nowait(item)

        timer = asyncio.get_running_loop().call_later(wait_s, back)
        self._put_off[item.index] = (timer, item, waiting)


@dataclass
class _Item:
    errand: _Errand
    index: int
    request: Request
    pause_s: float = 0.1


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read a whole answer; what goes beyond the limit is read too, so that a cut shows, but not kept."""
    kept = bytearray()
    async for piece in response.content.iter_chunked(1 << 16):
        if len(kept) < _ANSWER_LIMIT:
            kept += piece
    return bytes(kept) if len(kept) < _ANSWER_LIMIT else b""


def _fields(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content, parse_constant=lambda _: None)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate can be parsed but never stored
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _retry_after(value: str | None) -> float | None:
    """Read seconds or an HTTP date (RFC 9110, 10.2.3); what is neither is no wish."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return None if math.isnan(seconds) else max(0.05, seconds)


def _secrets_in(value: str) -> set[str]:
    """What of a header's value must not be shown: the value, what follows its scheme, a basic login's password."""
    scheme, _, token = value.rpartition(" ")
    texts = {value, token}
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            texts.add(b64decode(token).decode(errors="replace").partition(":")[2])
    return {text for text in texts if len(text) >= 4}


def _check_address(address: str) -> URL:
    try:
        url = URL(address.rstrip("/"))
    except ValueError:
        url = URL("")
    if url.scheme not in ("http", "https") or not url.host or url.user or url.query_string or url.fragment:
        raise ConnectionConfigError(
            "the API connection's address is not http(s)://host[:port][/path] without user, query or fragment. "
            "Put credentials into login and password."
        )
    return url
