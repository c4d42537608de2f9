"""The door to aiohttp of the verb infer: ask a model server, patiently and for no longer than allowed.

Invariants: a prediction has no effect on the server, so it is asked again when no connection, no whole answer or a
"later" (429, 503) came, with growing pauses, until the patience is over, and then the server is unavailable; every
other answer is final. Redirects are not followed, cookies not kept; no credential is in a log, an error or an answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.core.infer.remote.engine import RemoteEngine
from airflow_ai_provider.core.infer.remote.oip import OipWire
from airflow_ai_provider.core.infer.remote.rest import MlflowWire, TensorFlowWire, TorchServeWire
from airflow_ai_provider.core.infer.remote.wire import Ask, Reply, Wire
from airflow_ai_provider.errors import ConnectionConfigError, DeviceError, EngineUnavailableError, RowMismatchError

T = TypeVar("T")
log = logging.getLogger(__name__)
_WIRES: Mapping[str, Any] = {
    "oip": OipWire,
    "mlflow": MlflowWire,
    "torchserve": TorchServeWire,
    "tensorflow": TensorFlowWire,
}
_HEALTH = {"oip": "/v2/health/ready", "mlflow": "/ping", "torchserve": "/ping", "tensorflow": "/v1/models"}
_LATER = {408, 425, 429, 502, 503, 504}
_ANSWER_LIMIT = 256 << 20


def open_remote(
    pin: Pin, endpoint: RemoteEndpoint, headers: Mapping[str, str] | None = None, device: str = "auto"
) -> RemoteEngine:
    """Meet a model server and prove, where the protocol can, that it serves the pinned version.

    :param pin: what the run resolved; its files are not needed here.
    :param endpoint: where the server is.
    :param headers: sent with every request, such as ``Authorization``; their values are never shown.
    :param device: the device is the server's matter: ``require_cuda`` cannot be kept, anything else is only noted.
    :raises DeviceError: ``require_cuda`` was asked for; no retry helps.
    :raises ModelPinError: the server serves another version, or has no such model; no retry helps.
    :raises SignatureError: the server refuses rows of the signature's types; no retry helps.
    :raises ConnectionConfigError: wrong login, address or protocol; no retry helps.
    :raises EngineUnavailableError: the server does not answer; a retry may help.
    """
    if device == "require_cuda":
        raise DeviceError(
            f"device 'require_cuda' was asked for, and the model server {endpoint.url} does not tell what it runs on. "
            "No row was predicted. Leave device at 'auto' and let the server see to its GPU, or predict on a worker.",
            asked=device,
            found="remote",
        )
    line = HttpLine(endpoint, headers)
    try:
        wire: Wire = _WIRES[endpoint.protocol](pin, endpoint)
        engine = RemoteEngine(pin, endpoint, wire, line)
    except BaseException:
        line.close()
        raise
    served = f"model server {endpoint.url} ({endpoint.protocol}) for {pin.name} version {pin.version}"
    if engine.proof:
        log.info("%s: the pin holds, %s; which bytes it loaded is its own word", served, engine.proof)
    else:
        log.warning(
            "%s: the pin cannot be proved, because %s. What it predicts is taken on trust",
            served,
            "its connection names a version of its own" if endpoint.version else "it does not tell what it serves",
        )
    return engine


def probe_server(endpoint: RemoteEndpoint, headers: Mapping[str, str] | None = None) -> str:
    """Ask a server whether it is ready; every HTTP answer counts.

    :return: what answered, for a person.
    :raises EngineUnavailableError: when nothing answers; a retry may help.
    """
    line = HttpLine(endpoint, headers)
    try:
        reply = line.run(line.try_once(_HEALTH[endpoint.protocol]))
    finally:
        line.close()
    return f"{endpoint.url} answers with {reply.status}"


class HttpLine:
    """Ask one server from a thread of its own; connections are kept between questions.

    :param endpoint: the server, and the limits of time and of requests in flight.
    :param headers: sent with every request.
    """

    def __init__(self, endpoint: RemoteEndpoint, headers: Mapping[str, str] | None = None) -> None:
        self._endpoint = endpoint
        given = dict(headers or {})
        if any(c in f"{k}{v}" for k, v in given.items() for c in "\r\n\0"):
            raise ConnectionConfigError("a header of the model server's connection holds a line break. Correct it.")
        texts = [*given.values(), *(value.rpartition(" ")[2] for value in given.values())]
        # Longest first, so that no tail of a long secret is left when a shorter one is part of it.
        self._secrets = sorted({text for text in texts if len(text) >= 4}, key=len, reverse=True)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="model-server", daemon=True)
        self._thread.start()
        self._session, self._slots, self._turn = self.run(self._connect(given))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the line's loop; an interrupted caller ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def ask(self, asked: Ask) -> Reply:
        """Ask until there is an answer that is not "later".

        :raises EngineUnavailableError: none came in ``patience_s``; a retry may help.
        """
        return await self._ask(asked, self._slots)

    async def ask_alone(self, asked: Ask) -> Reply:
        """The same while nothing else of ours is in flight.

        :raises EngineUnavailableError: as for :meth:`ask`.
        """
        async with self._turn, AsyncExitStack() as all_slots:
            for _ in range(self._endpoint.in_flight):
                await all_slots.enter_async_context(self._slots)
            return await self._ask(asked, nullcontext())

    async def _ask(self, asked: Ask, slot: AbstractAsyncContextManager[None]) -> Reply:
        pause_s, until, tries = 0.1, 0.0, 0
        while True:
            async with slot:
                until = until or time.monotonic() + self._endpoint.patience_s
                left_s = until - time.monotonic()
                reply, fault, wish_s = await self._try(asked, min(self._endpoint.timeout_s, max(0.05, left_s)))
            if reply is not None:
                return reply
            tries += 1
            wait_s = pause_s if wish_s is None else wish_s
            if time.monotonic() + wait_s >= until:
                raise EngineUnavailableError(
                    f"the model server {self._endpoint.url} does not answer: {fault}. Asked {tries} times in "
                    f"{self._endpoint.patience_s:g} s. Bring it back; the retry goes on after the last finished part.",
                    url=self._endpoint.url,
                    tries=tries,
                )
            log.debug("model server: %s; asked again in %.1f s", fault, wait_s)
            await asyncio.sleep(wait_s)
            pause_s = min(pause_s * 2, 5.0)

    async def try_once(self, path: str) -> Reply:
        """Ask once and take any answer.

        :raises EngineUnavailableError: when none comes; a retry may help.
        """
        reply, fault, _ = await self._try(Ask(path, refuses=lambda reply: True), self._endpoint.timeout_s)
        if reply is None:
            raise EngineUnavailableError(
                f"the model server {self._endpoint.url} does not answer: {fault}. Check host and port there.",
                url=self._endpoint.url,
            )
        return reply

    def close(self) -> None:
        """Close all connections."""
        if self._loop.is_closed():
            return
        self.run(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _connect(
        self, headers: Mapping[str, str]
    ) -> tuple[aiohttp.ClientSession, asyncio.Semaphore, asyncio.Lock]:
        in_flight = self._endpoint.in_flight
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=in_flight),
            cookie_jar=aiohttp.DummyCookieJar(),
            # compressing numbers costs a server more than sending them
            headers={"Accept": "application/json, application/octet-stream", "Accept-Encoding": "identity", **headers},
        )
        return session, asyncio.Semaphore(in_flight), asyncio.Lock()

    async def _try(self, asked: Ask, timeout_s: float) -> tuple[Reply | None, str, float | None]:
        """Return a final answer; else what went wrong and how long the server wishes to be left alone."""
        url = URL(f"{self._endpoint.url}{asked.path}", encoded=True)
        try:
            asking = self._session.request(
                "POST" if asked.body else "GET",
                url,
                data=asked.body or None,
                headers=dict(asked.headers),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            )
            async with asking as got:
                body = await self._read(got)
                reply = Reply(got.status, body, dict(got.headers))
        except TimeoutError:
            return None, f"no whole answer in {timeout_s:.3g} s", None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return None, self._clean(str(error) or type(error).__name__), None
        if reply.status in _LATER and not asked.refuses(reply):
            return None, self._clean(reply.reason), _retry_after(reply.headers.get("Retry-After"))
        return (reply if reply.status == 200 else Reply(reply.status, self._hide(reply.body), reply.headers)), "", None

    async def _read(self, got: aiohttp.ClientResponse) -> bytes:
        kept = bytearray()
        async for piece in got.content.iter_chunked(1 << 16):
            kept += piece
            if len(kept) > _ANSWER_LIMIT:
                raise RowMismatchError(
                    f"the model server's answer is larger than {_ANSWER_LIMIT >> 20} MiB. Ask for fewer rows at a time "
                    "(batch_size), or for fewer outputs."
                )
        return bytes(kept)

    def _hide(self, body: bytes) -> bytes:
        for secret in self._secrets:
            body = body.replace(secret.encode(), b"***")
        return body

    def _clean(self, text: str) -> str:
        text = self._hide(text.encode()).decode()
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def _retry_after(value: str | None) -> float | None:
    """Read seconds or an HTTP date (RFC 9110, 10.2.3); what is neither is no wish."""
    if not value:
        return None
    try:
        return max(0.05, min(float(value), 86_400.0))
    except ValueError:
        pass
    try:
        return max(0.05, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
