"""What the SQL ledger asks of its database: the tables as SQLAlchemy sees them, and what is looked up in them.

Invariants: nothing here writes or commits; each function is one question within the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

from airflow_ai_provider.core import ledger_notes as lines
from airflow_ai_provider.core import ledger_schema as schema
from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ledger import Claim, Entry, Outcome
from airflow_ai_provider.core.ledger_rules import check_move

T = TypeVar("T")
_IN_LIMIT = 500  # keys per IN list: SQLite's oldest limit is 999 parameters


def _table(name: str, columns: Sequence[str]) -> sa.TableClause:
    return sa.table(f"ai_{name}", *map(sa.column, columns))


CLAIM = _table("claim", schema.CLAIM)
SLICE = _table("claim_slice", schema.SLICE)
NOTHING = _table("nothing", schema.NOTHING)
ENTRY = _table("entry", ("seq", *schema.ENTRY))
NOTES = {kind: _table(kind, (*schema.NOTE, *schema.ADDED.get(f"ai_{kind}", ()))) for kind in schema.NOTES}
ALIAS = _table("alias", schema.ALIAS)


def find_claim(connection: sa.Connection, pipeline: str, run_key: str) -> Claim | None:
    """Return what a run key holds."""
    query = sa.select(CLAIM).where(CLAIM.c.pipeline == pipeline, CLAIM.c.run_key == run_key)
    row = connection.execute(query).one_or_none()
    return lines.read_claim(row._mapping) if row else None


def last_without_rows(connection: sa.Connection, pipeline: str, run_key: str) -> str:
    """Return the last try of a run key that found no rows; empty when there was none."""
    mine = (NOTHING.c.pipeline == pipeline, NOTHING.c.run_key == run_key)
    return connection.execute(sa.select(NOTHING.c.attempt).where(*mine)).scalar() or ""


def rivals(connection: sa.Connection, pipeline: str, span: Span) -> Iterator[Claim]:
    """Yield the claims that may hold rows of a span; ``settle_claim`` looks closely."""
    for some in batched([s for s in span.slices if s.end > s.first], _IN_LIMIT):
        query = (
            sa.select(SLICE.c.claim_id)
            .where(SLICE.c.pipeline == pipeline, SLICE.c.source == span.source, SLICE.c.identity == span.identity)
            .where(SLICE.c.topic_partition.in_([s.partition for s in some]))
            .where(SLICE.c.first < max(s.end for s in some), SLICE.c.end > min(s.first for s in some))
        )
        claims = sa.select(CLAIM).where(CLAIM.c.id.in_(query)).order_by(CLAIM.c.id)
        yield from map(lines.read_claim, connection.execute(claims).mappings())


def demand_moves(connection: sa.Connection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes that change their entry, which stays locked until the transaction ends."""
    states: dict[str, str] = {}
    for some in batched(sorted({o.key for o in outcomes}), _IN_LIMIT):
        query = sa.select(ENTRY.c.key, ENTRY.c.state).where(ENTRY.c.key.in_(some)).order_by(ENTRY.c.key)
        states |= {row.key: row.state for row in connection.execute(query.with_for_update())}
    return [o for o in outcomes if check_move(o.key, states.get(o.key, "absent"), o.state)]


def sightings(registry: str, name: str) -> sa.Select[Any]:
    """Return the question where the aliases of a model were seen to point, oldest first."""
    mine = (ALIAS.c.registry == registry, ALIAS.c.name == name)
    return sa.select(ALIAS).where(*mine).order_by(ALIAS.c.seq)


def find_entries(connection: sa.Connection, keys: Sequence[str]) -> list[Entry]:
    """Return the entries of those keys that are known."""
    found: list[Entry] = []
    for some in batched(keys, _IN_LIMIT):
        found += map(lines.read_entry, connection.execute(sa.select(ENTRY).where(ENTRY.c.key.in_(some))).mappings())
    return found


def batched(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Return the items in lists of so many."""
    return (list(items[start : start + size]) for start in range(0, len(items), size))
