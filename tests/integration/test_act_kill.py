"""SIGKILL a process that acts on the real ticket service, run it again, and count what the service did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from airflow_ai_provider.core.act.effect import ActRun
from airflow_ai_provider.core.act.flow import act
from airflow_ai_provider.core.act.http import HttpSender
from airflow_ai_provider.core.act.saga import compensate
from airflow_ai_provider.core.act.value import HttpAction, Undo
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import (
    ActionUnavailableError,
    CompensationError,
    LedgerUnavailableError,
    SagaFailedError,
    UnknownOutcomeError,
)
from tests.servers.proxy import TcpProxy
from tests.servers.tickets import TicketService

TICKET = HttpAction("ticket", "/tickets", undo=Undo("DELETE", "/tickets/{id}"))
PAGE = HttpAction("page", "/pages", undo=Undo("DELETE", "/pages/{id}"))
pytestmark = pytest.mark.integration
ROWS = 400
ACTING = textwrap.dedent(
    """
    import json, sys
    from airflow_ai_provider.core.act.effect import ActRun
    from airflow_ai_provider.core.act.flow import act
    from airflow_ai_provider.core.act.http import HttpSender
    from airflow_ai_provider.core.act.value import HttpAction, Undo
    from airflow_ai_provider.core.batch import BatchRef
    from airflow_ai_provider.core.ledger_sql import open_ledger
    from airflow_ai_provider.core.store import Store
    root, url, address, ref = sys.argv[1:]
    action = HttpAction("ticket", "/tickets", undo=Undo("DELETE", "/tickets/{id}"))
    print("ready", flush=True)
    batch = BatchRef.from_dict(json.loads(ref))
    act([batch], action, Store(root), open_ledger(url), HttpSender(address, in_flight=8), ActRun("p", "r1"), chunk=16)
    """
)


@pytest.fixture
def tickets() -> Iterator[TicketService]:
    # slow, so that what shall be killed in the middle is there still, however late its killer comes
    service = TicketService("--delay-ms", "40", "--refuse-every", "7")
    yield service
    service.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    fresh: Callable[[], str] = request.getfixturevalue("fresh_postgres_url")
    return fresh()


def land_rows(store: Store, count: int = ROWS) -> BatchRef:
    writer = store.open_batch("p", "routes", "orders-1")
    ids = [f"orders/0/{n}" for n in range(count)]
    writer.write("act", pa.table({"_row_id": ids, "subject": [f"B-{n}" for n in range(count)]}))
    return writer.land({"predicted": count, "act": count}, {"key": "subject"}).only("act")


def act_here(store: Store, ledger: Ledger, address: str, action: HttpAction = TICKET, step: int = 0) -> BatchRef:
    sender = HttpSender(address, in_flight=16, timeout_s=30, patience_s=1)
    return act([land_rows(store)], action, store, ledger, sender, ActRun("p", "r1", step), chunk=16)


def killed_after(effects: int, tickets: TicketService, store: Store, url: str) -> None:
    """Act in a process of its own and kill it when the service has done so much."""
    ref = json.dumps(land_rows(store).to_dict())
    process = subprocess.Popen(
        [sys.executable, "-c", ACTING, store.root, url, tickets.address, ref],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while (done := len(tickets.effects())) < effects and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, "it was through before it could be killed"
    assert done >= effects, "it did too little"


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_each_ticket_is_there_once(
    tmp_path: Path, tickets: TicketService, url: str
) -> None:
    store = Store(str(tmp_path / "store"))
    for effects in (30, 120, 200):
        killed_after(effects, tickets, store, url)
    ledger = open_ledger(url)
    before = ledger.entries("p", "r1")
    assert {"done", "sent"} <= {e.state for e in before}, "the ledger says what may have left"
    assert store.find("p", "outcomes", "ticket") is None
    ref = act_here(store, ledger, tickets.address)
    assert ref.counts == {"rows": ROWS, "done": ROWS, "refused": 0, "unknown": 0, "muted": 0}
    assert len(tickets.effects()) == ROWS
    assert set(tickets.effects().values()) == {1}
    assert sorted(t["subject"] for t in tickets.get("/tickets")) == sorted(f"B-{n}" for n in range(ROWS))
    done = {e.key: e.outcome["id"] for e in ledger.entries("p", "r1", states=["done"])}
    assert done.keys() == tickets.effects().keys()
    assert set(done.values()) == {t["id"] for t in tickets.get("/tickets")}, "the ledger knows each ticket by its id"
    assert act_here(store, ledger, tickets.address) == ref


def test_a_network_that_cuts_and_half_writes_doubles_nothing(tmp_path: Path, tickets: TicketService, url: str) -> None:
    store, ledger = Store(str(tmp_path / "store")), open_ledger(url)
    proxy = TcpProxy("127.0.0.1", tickets.port)
    ref = None
    for _ in range(12):
        proxy.cut_after(9_000)
        try:
            ref = act_here(store, ledger, f"http://{proxy.address}")
            break
        except (UnknownOutcomeError, ActionUnavailableError):
            continue
    proxy.close()
    assert ref and ref.counts["done"] == ROWS
    assert len(tickets.effects()) == ROWS
    assert set(tickets.effects().values()) == {1}


def test_a_service_that_dies_meanwhile_is_transient_and_a_retry_does_the_rest(
    tmp_path: Path, tickets: TicketService, url: str
) -> None:
    store, ledger = Store(str(tmp_path / "store")), open_ledger(url)

    def kill_it() -> None:
        while len(ledger.entries("p", "r1", states=["done"])) < 40:
            time.sleep(0.01)
        tickets.kill()

    killer = threading.Thread(target=kill_it)
    killer.start()
    with pytest.raises((ActionUnavailableError, UnknownOutcomeError), match="http://127.0.0.1:") as caught:
        act_here(store, ledger, tickets.address)
    killer.join()
    assert "retry" in str(caught.value)
    tickets.restart()
    assert act_here(store, ledger, tickets.address).counts["done"] == ROWS
    assert set(tickets.effects().values()) == {1}


def test_tickets_of_refused_pages_are_deleted_once(tmp_path: Path, tickets: TicketService, url: str) -> None:
    store, ledger = Store(str(tmp_path / "store")), open_ledger(url)
    act_here(store, ledger, tickets.address)
    with pytest.raises(SagaFailedError, match="nobody is on duty for B-") as caught:
        act_here(store, ledger, tickets.address, PAGE, 1)
    refused = caught.value.ref.counts["refused"]
    assert 20 < refused < 120

    def undo() -> dict[str, int]:
        sender = HttpSender(tickets.address, patience_s=1, timeout_s=30)
        return compensate(ledger, sender, pipeline="p", run_id="r1", steps=["ticket", "page"], failed=["page"])

    tickets.kill()
    with pytest.raises(CompensationError):
        undo()
    tickets.restart()
    assert len(tickets.get("/tickets")) == ROWS
    assert undo() == {"compensated": refused, "kept": 2 * (ROWS - refused), "parked": 0}
    assert undo() == {"compensated": 0, "kept": 2 * (ROWS - refused), "parked": 0}
    left = {t["subject"] for t in tickets.get("/tickets")}
    assert left == {p["subject"] for p in tickets.get("/pages")}, "each ticket that is left has its page"
    assert set(tickets.effects().values()) == {1}
    assert ledger.open_sagas("p", "r1") == []


@pytest.mark.slow
def test_a_ledger_that_dies_meanwhile_loses_and_doubles_nothing(
    tmp_path: Path, tickets: TicketService, postgres_server: object, fresh_postgres_url: Callable[[], str]
) -> None:
    store, url = Store(str(tmp_path / "store")), fresh_postgres_url()
    ledger = open_ledger(url)

    def kill_it() -> None:
        while len(tickets.effects()) < 60:
            time.sleep(0.005)
        postgres_server.kill()  # type: ignore[attr-defined]

    killer = threading.Thread(target=kill_it)
    killer.start()
    with pytest.raises(LedgerUnavailableError):
        act_here(store, ledger, tickets.address)
    killer.join()
    postgres_server.restart()  # type: ignore[attr-defined]
    assert act_here(store, ledger, tickets.address).counts["done"] == ROWS
    assert len(tickets.effects()) == ROWS
    assert set(tickets.effects().values()) == {1}
