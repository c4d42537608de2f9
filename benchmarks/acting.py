"""What the act cases share: rows, the limit, ours over two databases, what users do today.

The limit is our own HTTP client with the same requests and no ledger: bodies made beforehand, nothing read, nothing
written. Ours is the whole verb: rows read from the store, bodies and keys made, a durable ledger written before and
after each call, outcomes landed. One by one does what HttpHook does, a session per call; it and httpx are
so slow that they send a twentieth of the rows and count it twenty times.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.request
from collections.abc import Callable, Sequence

import pyarrow as pa

from airflow_ai_provider.core.act.effect import ActRun
from airflow_ai_provider.core.act.flow import act
from airflow_ai_provider.core.act.http import HttpSender
from airflow_ai_provider.core.act.sender import Request
from airflow_ai_provider.core.act.value import HttpAction, Undo
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from benchmarks import receiver
from benchmarks.harness import Case, Place, Run

IN_FLIGHT, SHARE = 64, 20
_ACTION = HttpAction("ticket", "/tickets", undo=Undo("DELETE", "/tickets/{id}"))


def case(title: str, goal: str, make: Callable[[Place], None]) -> Case:
    """Return an act case; only the receiver's delay (in ``make``) differs."""
    contenders = {
        "limit": limit,
        "ours": ours_sqlite,
        "ours, PostgreSQL": ours_postgresql,
        "httpx, 64 in flight": with_httpx,
        "requests, one by one": one_by_one,
    }
    packages = ("aiohttp", "sqlalchemy", "psycopg", "httpx", "requests")
    return Case(title, "rows/s", (10_000, 2_000), "rows", goal, make, check, contenders, packages)


def prepare(place: Place, delay_s: float) -> None:
    """Start the receiver and land the rows to act on."""
    receiver.start(place.folder, delay_s)
    count = place.size
    table = pa.table(
        {
            "_row_id": [f"orders~1a2b3c4d/0/{n}" for n in range(count)],
            "subject": [f"B-{n:07d}" for n in range(count)],
            "confidence": [n / count for n in range(count)],
            "decision": ["malignant" if n % 3 else "benign" for n in range(count)],
        }
    )
    writer = Store(str(place.folder / "store")).open_batch("bench", "routes", "orders")
    writer.write("act", table)
    ref = writer.land({"predicted": count, "act": count}, {"key": "subject"}).only("act")
    (place.folder / "ref.json").write_text(json.dumps(ref.to_dict()), encoding="utf-8")


def check(place: Place) -> None:
    """Every effect that ours claims is at the receiver, none of them twice."""
    with urllib.request.urlopen(f"{_address(place)}/seen", timeout=10) as answer:
        seen = json.load(answer)
    assert seen["twice"] == 0, seen
    assert seen["keys"] >= 3 * place.size, f"the limit and two ledgers sent {place.size} keys each; {seen}"
    for who in ("sqlite", "postgresql"):
        found = json.loads((place.folder / f"{who}.json").read_text(encoding="utf-8"))
        assert found == {"done": place.size, "with_id": place.size}, (who, found)


def limit(place: Place) -> Run:
    """The same client, no ledger, bodies made beforehand."""
    rounds = itertools.count()

    def run() -> float:
        number = next(rounds)
        requests = [
            Request(f"limit-{number}-{n}", "POST", "/tickets", body) for n, body in enumerate(_bodies(place.size))
        ]
        sender = HttpSender(_address(place), in_flight=IN_FLIGHT)
        started = time.perf_counter()
        answers = sender.send(requests)
        sender.close()
        spent = time.perf_counter() - started
        assert all(answer.state == "done" for answer in answers)
        return spent

    return run


def ours_sqlite(place: Place) -> Run:
    """The verb over SQLite, every commit durable."""
    return _ours(place, "sqlite", open_ledger(f"sqlite:///{place.folder}/ledger.db"))


def ours_postgresql(place: Place) -> Run:
    """The verb over PostgreSQL with fsync on."""
    return _ours(place, "postgresql", open_ledger(receiver.addresses(place.folder)["postgresql"]))


def _ours(place: Place, who: str, ledger: Ledger) -> Run:
    store = Store(str(place.folder / "store"))
    ref = BatchRef.from_dict(json.loads((place.folder / "ref.json").read_text(encoding="utf-8")))
    sender = HttpSender(_address(place), in_flight=IN_FLIGHT)
    rounds = itertools.count()

    def run() -> float:
        # another pipeline each time: other keys, so every round sends all of it again
        pipeline = f"{who}-{next(rounds)}"
        started = time.perf_counter()
        outcomes = act([ref], _ACTION, store, ledger, sender, ActRun(pipeline, "r1"), progress=lambda _: None)
        spent = time.perf_counter() - started
        assert outcomes.counts["done"] == place.size
        if pipeline.endswith("-0"):
            done = ledger.entries(pipeline, states=["done"])
            found = {"done": len(done), "with_id": sum("id" in entry.outcome for entry in done)}
            (place.folder / f"{who}.json").write_text(json.dumps(found), encoding="utf-8")
        return spent

    return run


def with_httpx(place: Place) -> Run:
    """The other usual client, as concurrent as ours, no ledger and no key."""
    import asyncio

    import httpx

    async def send_all(bodies: Sequence[bytes]) -> None:
        waiting = iter(bodies)
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=IN_FLIGHT)) as client:

            async def work() -> None:
                for body in waiting:
                    answer = await client.post(f"{_address(place)}/tickets", content=body)
                    answer.raise_for_status()

            await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))

    def run() -> float:
        bodies = _bodies(place.size // SHARE)
        started = time.perf_counter()
        asyncio.run(send_all(bodies))
        return (time.perf_counter() - started) * SHARE

    return run


def one_by_one(place: Place) -> Run:
    """A loop over the rows with a session per call, as Airflow's HttpHook.run makes one."""
    import requests

    def run() -> float:
        bodies = _bodies(place.size // SHARE)
        started = time.perf_counter()
        for body in bodies:
            with requests.Session() as session:
                session.headers["Content-Type"] = "application/json"
                session.post(f"{_address(place)}/tickets", data=body).raise_for_status()
        return (time.perf_counter() - started) * SHARE

    return run


def _bodies(count: int) -> list[bytes]:
    return [b'{"confidence":0.5,"decision":"malignant","subject":"B-%07d"}' % n for n in range(count)]


def _address(place: Place) -> str:
    return receiver.addresses(place.folder)["http"]
