"""What every sender promises, over the scripted fake and HTTP to the real ticket service; HTTP among evil servers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from airflow_ai_provider.core.act.http import HttpSender
from airflow_ai_provider.core.act.sender import STATES, Request, Sender
from airflow_ai_provider.errors import ActionUnavailableError, ConnectionConfigError
from airflow_ai_provider.testing.sender import ScriptedSender
from tests.servers.process import free_port
from tests.servers.proxy import TcpProxy
from tests.servers.tickets import TicketService

Effects = Callable[[], dict[str, int]]


@pytest.fixture(scope="module")
def tickets() -> Iterator[TicketService]:
    service = TicketService("--refuse-when", "subject=nobody")
    yield service
    service.close()


@pytest.fixture(params=["scripted", "http"])
def desk(request: pytest.FixtureRequest) -> Iterator[tuple[Sender, Effects]]:
    """A sender, and what its receiver says that it did."""
    if request.param == "scripted":
        scripted = ScriptedSender(lambda r, _: "refused" if b"nobody" in (r.body or b"") else "done")
        yield scripted, lambda: scripted.effects
        return
    service: TicketService = request.getfixturevalue("tickets")
    sender = HttpSender(service.address, in_flight=8, patience_s=2)
    yield sender, service.effects
    sender.close()


def ask(key: str, subject: str = "s", path: str = "/tickets", method: str = "POST") -> Request:
    return Request(key, method, path, json.dumps({"subject": subject}).encode())


# --- the contract ---


def test_answers_keep_the_order_and_carry_the_id(desk: tuple[Sender, Effects], request: pytest.FixtureRequest) -> None:
    sender, effects = desk
    wanted = [ask(f"order-{n}", f"s{n}") for n in range(50)]
    answers = sender.send(wanted)
    assert {a.state for a in answers} == {"done"} <= set(STATES)
    assert {a.status for a in answers} == {201}
    assert len({(a.body or {})["id"] for a in answers}) == 50
    assert [sender.send([r])[0] for r in wanted[:3]] == answers[:3], "the same key gets its first answer"
    assert all(effects()[f"order-{n}"] == 1 for n in range(50))
    assert sender.send([]) == []


def test_a_key_stands_for_one_payload(desk: tuple[Sender, Effects]) -> None:
    sender, effects = desk
    assert sender.send([ask("clash", "a")])[0].state == "done"
    answer = sender.send([ask("clash", "b")])[0]
    assert (answer.state, answer.status) == ("refused", 409)
    assert effects()["clash"] == 1


def test_a_refusal_says_why_and_does_nothing(desk: tuple[Sender, Effects]) -> None:
    sender, effects = desk
    answers = sender.send([ask("ok-1", "a", "/pages"), ask("no-1", "nobody", "/pages"), ask("ok-2", "b", "/pages")])
    assert [a.state for a in answers] == ["done", "refused", "done"]
    assert answers[1].status == 422
    assert answers[1].reason
    assert "no-1" not in effects()


def test_several_threads_send_through_one_sender(desk: tuple[Sender, Effects]) -> None:
    sender, effects = desk
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda t: sender.send([ask(f"thread-{t}-{n}") for n in range(20)]), range(4)))
    assert all(a.state == "done" for some in answers for a in some)
    assert sum(n for key, n in effects().items() if key.startswith("thread-")) == 80


def test_a_closed_sender_opens_again(desk: tuple[Sender, Effects]) -> None:
    sender, effects = desk
    sender.close()
    sender.close()
    assert sender.send([ask("after-close")])[0].state == "done"
    assert effects()["after-close"] == 1
    assert isinstance(sender, Sender)


# --- HTTP among evil servers ---

Answerer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class EvilServer:
    """Speak raw bytes: the parsed request goes to a function that may do anything with the connection."""

    def __init__(self, answer: Callable[[str, dict[str, str], bytes, int], bytes | None]) -> None:
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.heads: list[dict[str, str]] = []
        self.busy = self.busiest = 0
        self._thread.start()
        assert self._ready.wait(60)
        self.address = f"http://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                raw = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = raw.strip().split("\r\n")
                head = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(head.get("content-length", 0)))
                self.heads.append(head)
                self.busy += 1
                self.busiest = max(self.busy, self.busiest)
                await asyncio.sleep(0.01)
                self.busy -= 1
                answer = self._answer(first, head, body, len(self.heads))
                if answer is None:
                    await asyncio.sleep(60)  # hangs until the test ends
                elif answer == b"":
                    break
                else:
                    writer.write(answer)
                    await writer.drain()
                    if b"HALF" in answer:
                        break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    def close(self) -> None:
        def stop() -> None:
            self._server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_later(0.05, self._loop.stop)

        self._loop.call_soon_threadsafe(stop)
        self._thread.join(60)
        self._loop.close()


def http(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body.encode())}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body.encode()


@contextmanager
def evil(answer: Callable[..., bytes | None], **options: Any) -> Iterator[tuple[EvilServer, HttpSender]]:
    server = EvilServer(answer)
    sender = HttpSender(server.address, **{"patience_s": 2.5, "timeout_s": 1.5, **options})
    try:
        yield server, sender
    finally:
        sender.close()
        server.close()


@pytest.mark.parametrize(
    ("wire", "state", "status", "reason"),
    [
        (http("200 OK", '{"id": 7}'), "done", 200, ""),
        (http("202 Accepted"), "done", 202, ""),
        (http("204 No Content"), "done", 204, ""),
        (http("200 OK", "<html>fine</html>"), "done", 200, ""),
        (http("422 X", '{"detail": "too old"}'), "refused", 422, "422: too old"),
        (http("400 X", '{"error": {"code": 9}}'), "refused", 400, '400: {"code": 9}'),
        (http("404 X", "nothing here"), "refused", 404, "404: nothing here"),
        (http("409 X", '{"title": "other payload"}'), "refused", 409, "409: other payload"),
        (http("501 X", ""), "refused", 501, "501:"),
        (http("302 X", "", "Location: http://elsewhere/x"), "refused", 302, "302: redirects to http://elsewhere/x"),
        (http("401 X", "who are you"), "later", 401, "401: who are you"),
        (http("429 X", "", "Retry-After: 30"), "later", 429, "429:"),
        (http("409 X", "in progress", "Retry-After: 30"), "later", 409, "409: in progress"),
        (http("503 X", "", "Retry-After: Wed, 21 Oct 2099 07:28:00 GMT"), "later", 503, "503:"),
        (http("500 X", "oops"), "unknown", 500, "500: oops"),
        (http("502 X", "<h1>bad</h1>"), "unknown", 502, "502: <h1>bad</h1>"),
        (http("504 X", ""), "unknown", 504, "504:"),
        (b"", "unknown", 0, "was cut"),
        (None, "unknown", 0, "no whole answer"),
        (b'HTTP/1.1 201 Created\r\nContent-Length: 500\r\n\r\n{"id": HALF', "unknown", 0, "was cut"),
        (b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nHALF", "unknown", 0, "was cut"),
        (b"HTTP/1.1 2", "unknown", 0, ""),
        (b"220 smtp.example ESMTP HALF\r\n\r\n", "unknown", 0, "was cut"),
    ],
)
def test_what_an_answer_means(wire: bytes | None, state: str, status: int, reason: str) -> None:
    with evil(lambda *_: wire) as (server, sender):
        started = time.monotonic()
        answer = sender.send([ask("k")])[0]
        assert (answer.state, answer.status) == (state, status)
        assert reason in answer.reason
        assert time.monotonic() - started < 30
        assert {h["idempotency-key"] for h in server.heads} == {"k"}


def test_the_answers_fields_come_through() -> None:
    body = {"id": "ä/7", "deep": {"a": [1, None]}}
    with evil(lambda *_: http("201 Created", json.dumps(body))) as (server, sender):
        assert sender.send([ask("k")])[0].body == body
        assert server.heads[0]["content-type"] == "application/json"
    for odd in ('{"id": "\\ud800"}', "[1, 2]", "7", '{"id":' * 5000):
        with evil(lambda *_, odd=odd: http("201 Created", odd)) as (_, sender):
            answer = sender.send([ask("k")])[0]
            assert (answer.state, answer.body) == ("done", None), odd[:20]


def test_a_busy_receiver_is_asked_again_with_the_same_key() -> None:
    busy = [http("503 X"), http("429 X", "", "Retry-After: 0.1"), http("201 Created", '{"id": 1}')]
    with evil(lambda *a: busy[a[3] - 1], patience_s=60, timeout_s=30) as (server, sender):
        assert sender.send([ask("k")])[0].state == "done"
        assert [h["idempotency-key"] for h in server.heads] == ["k", "k", "k"]


def test_retry_after_beyond_the_patience_is_not_waited_for() -> None:
    with evil(lambda *_: http("429 X", "", "Retry-After: 3600"), patience_s=60) as (server, sender):
        started = time.monotonic()
        assert sender.send([ask("k")])[0].state == "later"
        assert time.monotonic() - started < 30
        assert len(server.heads) == 1


def test_retry_after_is_obeyed() -> None:
    answers = [http("503 X", "", "Retry-After: 0.7"), http("200 OK")]
    with evil(lambda *a: answers[a[3] - 1], patience_s=60, timeout_s=30) as (_, sender):
        started = time.monotonic()
        assert sender.send([ask("k")])[0].state == "done"
        assert time.monotonic() - started >= 0.7


def test_an_unknown_outcome_is_not_tried_again_behind_the_callers_back() -> None:
    with evil(lambda *_: b"") as (server, sender):
        assert sender.send([ask("k")])[0].state == "unknown"
        assert len(server.heads) == 1


def test_nobody_listens() -> None:
    sender = HttpSender(f"http://127.0.0.1:{free_port()}", patience_s=0.8, in_flight=4)
    started = time.monotonic()
    answers = sender.send([ask(f"k{n}") for n in range(100)])
    assert {a.state for a in answers} == {"later"}
    assert all(sender.address in a.reason for a in answers)
    assert time.monotonic() - started < 15, "a hundred requests share one patience"
    with pytest.raises(ActionUnavailableError, match="does not answer"):
        sender.probe()
    sender.close()


def test_no_such_host() -> None:
    sender = HttpSender("http://no-such-host.invalid", patience_s=0.3)
    assert sender.send([ask("k")])[0].state == "later"
    sender.close()


def test_in_flight_is_kept_and_never_exceeded() -> None:
    with evil(lambda *_: http("200 OK"), in_flight=6, timeout_s=30) as (server, sender):
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda t: sender.send([ask(f"{t}-{n}") for n in range(60)]), range(3)))
        assert server.busiest == 6


def test_closed_while_sending_lets_nobody_wait_for_ever() -> None:
    with evil(lambda *_: None, timeout_s=60, in_flight=2) as (server, sender), ThreadPoolExecutor(1) as pool:
        answers = pool.submit(sender.send, [ask(f"k{n}") for n in range(5)])
        while not server.heads:
            time.sleep(0.01)
        sender.close()
        assert {a.state for a in answers.result(60)} == {"unknown"}


def test_secrets_are_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    def echo(first: str, head: dict[str, str], *_: Any) -> bytes:
        return http("422 X", f"you sent {head}")

    login = "Basic " + b64encode(b"ada:hunter2-long").decode()
    secrets = {"headers": {"Authorization": login, "X-Api-Key": "topsecret-9", "Y": "Bearer abcdefgh"}}
    with evil(echo, **secrets) as (server, sender):
        answer = sender.send([ask("k")])[0]
        sent = server.heads[0]
        assert sent["authorization"].startswith("Basic ")
        assert sent["x-api-key"] == "topsecret-9"
        told = f"{answer} {sender.address} {sender!r} {caplog.text}"
        for secret in ("hunter2", "topsecret", "abcdefgh", sent["authorization"][6:]):
            assert secret not in told
        assert "you sent" in answer.reason
        assert len(answer.reason) <= 300


def test_a_reason_is_short_and_of_one_line() -> None:
    with evil(lambda *_: http("400 X", "a\x00b\r\nc\x1b[31m" + "x" * 9000)) as (_, sender):
        reason = sender.send([ask("k")])[0].reason
        assert reason.startswith("400: a b c [31mxxx")
        assert len(reason) == 300
        assert reason.isprintable()


def test_a_huge_answer_is_read_but_not_kept() -> None:
    with evil(lambda *_: http("200 OK", json.dumps({"id": 1, "pad": "x" * 3_000_000})), timeout_s=60) as (_, sender):
        answer = sender.send([ask("k")])[0]
        assert (answer.state, answer.body) == ("done", None)


def test_redirects_are_not_followed() -> None:
    with evil(lambda *_: http("307 X", "", "Location: /elsewhere")) as (server, sender):
        assert sender.send([ask("k")])[0].state == "refused"
        assert len(server.heads) == 1


@pytest.mark.parametrize(
    "address",
    ["", "tickets:80", "ftp://h", "http://", "http://u:hunter2@h", "http://h?x=1", "http://h#f", "http://h:x"],
)
def test_addresses_that_cannot_be(address: str) -> None:
    with pytest.raises(ConnectionConfigError) as caught:
        HttpSender(address)
    assert "hunter2" not in str(caught.value)


def test_a_header_with_a_line_break_is_refused_unsaid() -> None:
    with pytest.raises(ConnectionConfigError) as caught:
        HttpSender("http://h", headers={"X": "top\r\nsecret"})
    assert "secret" not in str(caught.value)


def test_a_base_path_comes_before_the_endpoint() -> None:
    seen: list[str] = []
    with evil(lambda first, *_: (seen.append(first), http("200 OK"))[1]) as (server, _):
        sender = HttpSender(f"{server.address}/api/v2/")
        sender.send([ask("k", path="/tickets/a%2Fb%20c")])
        assert sender.address.endswith("/api/v2")
        sender.close()
    assert seen == ["POST /api/v2/tickets/a%2Fb%20c HTTP/1.1"]


# --- the real service through a network that fails ---


def test_an_answer_cut_half_is_unknown_though_the_ticket_is_there(tickets: TicketService) -> None:
    proxy = TcpProxy("127.0.0.1", tickets.port)
    sender = HttpSender(f"http://{proxy.address}", timeout_s=30)
    proxy.cut_after(40)
    assert sender.send([ask("half")])[0].state == "unknown"
    assert tickets.effects()["half"] == 1
    again = sender.send([ask("half")])[0]
    assert (again.state, again.status) == ("done", 201)
    assert tickets.effects()["half"] == 1
    sender.close()
    proxy.close()


def test_a_frozen_service_is_unknown_and_asked_again_is_once(tickets: TicketService) -> None:
    hasty, sender = HttpSender(tickets.address, timeout_s=0.5), HttpSender(tickets.address, timeout_s=30)
    tickets.pause()
    assert hasty.send([ask("frozen")])[0].state == "unknown"
    tickets.resume()
    assert sender.send([ask("frozen")])[0].state == "done"
    assert tickets.effects()["frozen"] == 1
    hasty.close()
    sender.close()


def test_a_killed_service_is_later_and_back_again_it_knows_its_keys(tickets: TicketService) -> None:
    sender = HttpSender(tickets.address, timeout_s=30, patience_s=0.5)
    assert sender.send([ask("before")])[0].state == "done"
    tickets.kill()
    assert sender.send([ask("during")])[0].state in ("later", "unknown")
    assert sender.send([ask("during")])[0].state == "later"
    tickets.restart()
    assert [a.state for a in sender.send([ask("before"), ask("during")])] == ["done", "done"]
    assert {k: n for k, n in tickets.effects().items() if k in ("before", "during")} == {"before": 1, "during": 1}
    assert "answers with" in sender.probe()
    sender.close()
