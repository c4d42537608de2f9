"""The ledger in a SQL database: SQLite (the default) or PostgreSQL.

Invariants: each method is one transaction; what may follow what is decided by the pure functions of ``ledger.py``;
writers of one SQLite file go one at a time (``BEGIN IMMEDIATE``), claims of one pipeline in PostgreSQL too (an advisory
lock); no password is in an error's text. What is looked up is in ``ledger_query.py``, how a database is opened in
``ledger_engine.py``; these three are the doors to SQLAlchemy.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, groupby
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from airflow_ai_provider.core import ledger_notes as lines
from airflow_ai_provider.core import ledger_schema as schema
from airflow_ai_provider.core.batch import BatchRef, Span
from airflow_ai_provider.core.ledger import Claim, Entry, Intent, Ledger, Outcome, Sighting
from airflow_ai_provider.core.ledger_notes import NoteKeeper
from airflow_ai_provider.core.ledger_query import (
    ALIAS,
    CLAIM,
    ENTRY,
    NOTES,
    NOTHING,
    SLICE,
    batched,
    demand_moves,
    find_claim,
    find_entries,
    last_without_rows,
    rivals,
    sightings,
)
from airflow_ai_provider.core.ledger_rules import (
    check_attempt,
    check_fingerprints,
    check_landing,
    open_among,
    settle_aliases,
    settle_claim,
)
from airflow_ai_provider.errors import LedgerUnavailableError

T = TypeVar("T")
_ROWS_AT_A_TIME = 128  # per statement: SQLite takes 32,766 values, and keeps the texts of 128 statements


def open_ledger(url: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Ledger:
    """Open the ledger at a database URL, making the tables and columns that are missing.

    :param url: ``sqlite:////data/ledger.db`` or ``postgresql://user:password@host/database``.
    :param now: the clock.
    :raises ConnectionConfigError: when the URL names no durable database that is supported; a retry does not help.
    :raises MissingExtraError: when the driver is not installed; a retry does not help.
    :raises LedgerUnavailableError: when the database does not answer; a retry may help.
    """
    from airflow_ai_provider.core.ledger_engine import open_engine

    ledger = SqlLedger(open_engine(url), now)
    ledger.make_tables()
    return ledger


class SqlLedger(NoteKeeper):
    """Keep the ledger in SQLite or PostgreSQL, as :class:`~airflow_ai_provider.core.ledger.Ledger` promises."""

    def __init__(self, engine: sa.Engine, now: Callable[[], datetime]) -> None:
        self._engine, self._now = engine, now
        self._is_sqlite = engine.dialect.name == "sqlite"
        # SQLite's own waiting polls with sleeps of up to 0.1 s; threads of one process can queue without.
        self._turn = threading.Lock()

    def make_tables(self) -> None:
        """Create what is missing, in tables of an older release too; two processes may do so at once."""

        def create(connection: sa.Connection) -> None:
            self._lock(connection, "tables")
            for statement in schema.statements(self._engine.dialect.name):
                connection.exec_driver_sql(statement)
            found = sa.inspect(connection)
            for table in schema.ADDED:
                for statement in schema.additions(table, [c["name"] for c in found.get_columns(table)]):
                    connection.exec_driver_sql(statement)

        self._write(create)

    # --- claims ---

    def claim(self, pipeline: str, run_key: str, span: Span, run_id: str, attempt: str = "") -> Claim:
        def take(connection: sa.Connection) -> Claim:
            self._lock(connection, f"claim {pipeline}")
            held = find_claim(connection, pipeline, run_key)
            if held is None:
                check_attempt(run_key, attempt, last_without_rows(connection, pipeline, run_key))
                held = settle_claim(span, rivals(connection, pipeline, span))
            if held is None:
                held = Claim(pipeline, run_key, span, "claimed", None, run_id)
                new = sa.insert(CLAIM).values(lines.claim_row(held, self._now())).returning(CLAIM.c.id)
                number = connection.execute(new).scalar_one()
                if span.slices:
                    connection.execute(sa.insert(SLICE), lines.slice_rows(held, number))
            return held

        return self._write(take)

    def claim_nothing(self, pipeline: str, run_key: str, attempt: str = "") -> Claim | None:
        insert = self._insert(NOTHING)
        new = {"attempt": attempt, "at": self._at()}
        note = insert.values(pipeline=pipeline, run_key=run_key, **new)
        note = note.on_conflict_do_update(index_elements=["pipeline", "run_key"], set_=new)

        def close(connection: sa.Connection) -> Claim | None:
            self._lock(connection, f"claim {pipeline}")
            held = find_claim(connection, pipeline, run_key)
            if held is None and attempt > last_without_rows(connection, pipeline, run_key):
                connection.execute(note)
            return held

        return self._write(close)

    def claim_of(self, pipeline: str, run_key: str) -> Claim | None:
        return self._read(lambda connection: find_claim(connection, pipeline, run_key))

    def claims(self, pipeline: str | None = None, state: str | None = None) -> list[Claim]:
        query = sa.select(CLAIM).order_by(CLAIM.c.id)
        for column, value in ((CLAIM.c.pipeline, pipeline), (CLAIM.c.state, state)):
            query = query if value is None else query.where(column == value)
        return [lines.read_claim(row._mapping) for row in self._select(query)]

    def landed(self, pipeline: str, run_key: str, ref: BatchRef) -> None:
        def land(connection: sa.Connection) -> None:
            self._lock(connection, f"claim {pipeline}")
            if check_landing(find_claim(connection, pipeline, run_key), pipeline, run_key, ref):
                connection.execute(
                    sa.update(CLAIM)
                    .where(CLAIM.c.pipeline == pipeline, CLAIM.c.run_key == run_key)
                    .values(state="landed", ref=lines.json_text(ref.to_dict()), updated_at=self._at())
                )

        self._write(land)

    def position(self, pipeline: str, source: str, identity: str) -> dict[str, int]:
        query = (
            sa.select(SLICE.c.topic_partition, sa.func.max(SLICE.c.end).label("last"))
            .where(SLICE.c.pipeline == pipeline, SLICE.c.source == source, SLICE.c.identity == identity)
            .group_by(SLICE.c.topic_partition)
        )
        return {row.topic_partition: int(row.last) for row in self._select(query)}

    def files_taken(self, pipeline: str, source: str) -> dict[str, str]:
        query = (
            sa.select(SLICE.c.topic_partition, SLICE.c.digest)
            .where(SLICE.c.pipeline == pipeline, SLICE.c.source == source)
            .order_by(SLICE.c.claim_id)
        )
        return {row.topic_partition: row.digest for row in self._select(query)}

    def release(self, pipeline: str, run_key: str) -> None:
        mine = (CLAIM.c.pipeline == pipeline, CLAIM.c.run_key == run_key, CLAIM.c.state != "landed")
        self._write(lambda connection: connection.execute(sa.delete(CLAIM).where(*mine)))

    # --- effects ---

    def reserve(self, intents: Sequence[Intent]) -> list[Entry]:
        at = self._now()
        known = self._add(intents, at, "reserved")
        fresh = {i.key: lines.new_entry(i, at) for i in reversed(intents) if i.key not in known}
        return [known.get(i.key) or fresh[i.key] for i in intents]

    def dispatch(self, intents: Sequence[Intent]) -> dict[str, Entry]:
        return self._add(intents, self._now(), "sent")

    def _add(self, intents: Sequence[Intent], at: datetime, state: str) -> dict[str, Entry]:
        """Insert what is new, all of it or nothing; return what was known."""
        known: dict[str, Entry] = {}
        check_fingerprints({}, intents)
        new = {i.key: i for i in reversed(intents)}

        def insert(connection: sa.Connection) -> bool:
            fresh = [new[key] for key in dict.fromkeys(i.key for i in intents) if key not in known]
            # Lines keep the order of their intents, and two who insert the same keys in two orders would deadlock.
            self._lock(connection, f"entry {intents[0].pipeline if intents else ''}")
            added = self._many(connection, schema.INSERT_ENTRY, lines.entry_rows(fresh, at, state))
            return self._all_or_none(connection, added, len(fresh))

        # Nearly always all are new, and the INSERT's count says so; else look which, and insert the rest.
        while not self._write(insert):
            known = self._read(lambda connection: {e.key: e for e in find_entries(connection, list(new))})
            check_fingerprints({k: e.fingerprint for k, e in known.items()}, intents)
        return known

    def sent(self, keys: Collection[str]) -> None:
        self._move([Outcome(key, "sent") for key in set(keys)])

    def record(self, outcomes: Sequence[Outcome]) -> None:
        self._move(outcomes)

    def _move(self, outcomes: Sequence[Outcome]) -> None:
        at = self._at()
        # In one order everywhere, so that two processes that move the same entries wait instead of deadlocking.
        ordered = sorted(outcomes, key=lambda o: (o.state, o.key))

        def move(connection: sa.Connection, moving: Sequence[Outcome]) -> bool:
            counts = [
                self._many(
                    connection, schema.move_entry(state), [(lines.json_text(dict(o.outcome)), at, o.key) for o in some]
                )
                for state, some in groupby(moving, key=lambda o: o.state)
            ]
            return self._all_or_none(connection, sum(counts), len(moving))

        # Nearly always all may move, and the UPDATE's count says so; else look at each.
        if not self._write(lambda connection: move(connection, ordered)):
            self._write(lambda connection: move(connection, demand_moves(connection, ordered)))

    def look_up(self, key: str) -> Entry | None:
        return next(iter(self._read(lambda connection: find_entries(connection, [key]))), None)

    def entries(
        self,
        pipeline: str,
        run_id: str | None = None,
        action: str | None = None,
        saga: str | None = None,
        states: Collection[str] | None = None,
    ) -> list[Entry]:
        query = sa.select(ENTRY).where(ENTRY.c.pipeline == pipeline).order_by(ENTRY.c.step, ENTRY.c.seq)
        for name, value in (("run_id", run_id), ("action", action), ("saga", saga)):
            if value is not None:
                query = query.where(ENTRY.c[name] == value)
        if states is not None:
            query = query.where(ENTRY.c.state.in_(sorted(states)))
        return [lines.read_entry(row._mapping) for row in self._select(query)]

    def open_sagas(self, pipeline: str, run_id: str) -> list[str]:
        query = (
            sa.select(ENTRY.c.saga, ENTRY.c.state)
            .where(ENTRY.c.pipeline == pipeline, ENTRY.c.run_id == run_id, ENTRY.c.undoes == "")
            .order_by(ENTRY.c.step, ENTRY.c.seq)
        )
        return open_among((row.saga, row.state) for row in self._select(query))

    # --- notes: pins, decisions, reviews, finished actions ---

    def _note(
        self,
        kind: str,
        pipeline: str,
        run_id: str,
        values: Mapping[str, Mapping[str, Any]],
        replace: bool = True,
        **columns: str | None,
    ) -> None:
        at, insert, key = self._at(), self._insert(NOTES[kind]), ["pipeline", "run_id", "name"]
        same = {"pipeline": pipeline, "run_id": run_id, "at": at, **columns}
        rows = [{**same, "name": name, "value": lines.json_text(dict(value))} for name, value in values.items()]
        changed = {"value": insert.excluded.value, "at": insert.excluded.at}
        kept = insert.on_conflict_do_nothing(index_elements=key)
        statement = insert.on_conflict_do_update(index_elements=key, set_=changed) if replace else kept
        if rows:
            self._write(lambda connection: connection.execute(statement, rows))

    def _notes(self, kind: str, pipeline: str, run_id: str) -> dict[str, Any]:
        table = NOTES[kind]
        query = sa.select(table.c.name, table.c.value).where(table.c.pipeline == pipeline, table.c.run_id == run_id)
        return {row.name: json.loads(row.value) for row in self._select(query.order_by(table.c.seq))}

    def _pins(self, name: str, pipeline: str | None) -> list[Mapping[str, Any]]:
        table = NOTES["pin"]
        query = sa.select(table).where(table.c.name == name).order_by(table.c.seq)
        if pipeline is not None:
            query = query.where(table.c.pipeline == pipeline)
        return [dict(row._mapping) for row in self._select(query)]

    # --- where aliases pointed ---

    def saw_aliases(self, registry: str, name: str, aliases: Mapping[str, str]) -> None:
        at, model = self._at(), {"registry": registry, "name": name}

        def note(connection: sa.Connection) -> None:
            self._lock(connection, f"alias {name}")
            latest = {row.alias: row for row in connection.execute(sightings(registry, name)).all()}
            fresh, same = settle_aliases({alias: row.version for alias, row in latest.items()}, aliases)
            for row in (latest[alias] for alias in same):
                seen = sa.update(ALIAS).where(ALIAS.c.seq == row.seq).values(last_at=max(at, row.last_at))
                connection.execute(seen)
            new = [{**model, "alias": a, "version": v, "first_at": at, "last_at": at} for a, v in fresh.items()]
            if new:
                connection.execute(sa.insert(ALIAS), new)

        self._write(note)

    def alias_history(self, registry: str, name: str, alias: str) -> list[Sighting]:
        query = sightings(registry, name).where(ALIAS.c.alias == alias)
        return [lines.read_sighting(row._mapping) for row in self._select(query)]

    # --- transactions ---

    def _at(self) -> str:
        return lines.time_text(self._now())

    def _insert(self, table: sa.TableClause) -> Any:
        return (sqlite if self._is_sqlite else postgresql).insert(table)

    def _lock(self, connection: sa.Connection, what: str) -> None:
        if not self._is_sqlite:
            number = int.from_bytes(hashlib.sha256(f"ai_ledger {what}".encode()).digest()[:8], signed=True)
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))

    def _many(self, connection: sa.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> int:
        """Run a statement for many rows at a time, and return how many rows it touched.

        One statement with many rows, not one per row: SQLite's driver lets go of the interpreter for each statement
        and, in a busy process, waits to get it back; to PostgreSQL each is a message.
        """
        touched = 0
        for some in batched(rows, _ROWS_AT_A_TIME):
            marks = "(" + ", ".join(["?" if self._is_sqlite else "%s"] * len(some[0])) + ")"
            text = statement.format(rows=", ".join([marks] * len(some)))
            values = tuple(chain.from_iterable(some))
            touched += connection.exec_driver_sql(text, values, {"preserve_rowcount": True}).rowcount
        return touched

    @staticmethod
    def _all_or_none(connection: sa.Connection, touched: int, wanted: int) -> bool:
        if touched != wanted:
            connection.rollback()
        return touched == wanted

    def _select(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        return self._read(lambda connection: connection.execute(query).all())

    def _read(self, work: Callable[[sa.Connection], T]) -> T:
        return self._transact(self._engine, work)

    def _write(self, work: Callable[[sa.Connection], T]) -> T:
        engine = self._engine.execution_options(**{schema.WRITE: True})
        if self._is_sqlite:
            with self._turn:
                return self._transact(engine, work)
        return self._transact(engine, work)

    def _transact(self, engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
        for patience in (True, True, False):
            try:
                with engine.begin() as connection:
                    return work(connection)
            except (DBAPIError, PoolTimeoutError) as error:
                # 40001, 40P01: PostgreSQL undid the whole transaction in favour of another one
                if patience and getattr(getattr(error, "orig", None), "sqlstate", "") in ("40001", "40P01"):
                    continue
                raise LedgerUnavailableError(
                    f"the ledger at {engine.url.render_as_string(hide_password=True)} did not answer: "
                    f"{str(getattr(error, 'orig', error)).strip().splitlines()[0]}. "
                    "Check that the database is up and reachable; the retry goes on from what is recorded."
                ) from error
        raise AssertionError("unreachable: the last try returns or raises")
