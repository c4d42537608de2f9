"""Hold what landed against what a plain consumer finds in the topic, message by message.

Invariants: the topic is read by Kafka's own client alone, never by ours; the first thing that is wrong is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, BatchRef
from airflow_ai_provider.core.ingest.shelf import superseded
from airflow_ai_provider.core.ledger import Claim
from airflow_ai_provider.core.store import MANIFEST, Store
from tests.kill.traffic import PARTITIONS, Traffic, message, unique
from tests.kill.worker import PIPELINE, World

Place = tuple[int, int]
"""Topic partition and offset."""


@dataclass(frozen=True)
class Proof:
    """What was held against what; everything agreed."""

    committed: int
    aborted: int
    accepted: int
    quarantined: int
    doubled: int
    batches: int
    cut: int
    empty_batches: int
    asides: int


def prove(world: World, traffic: Traffic, run_keys: Collection[str]) -> Proof:
    """Demand that every committed message is in exactly one table of exactly one landed batch, and nothing else is.

    Call it when everything is drained: no process runs, every run has landed.
    """
    ends, found = _read_topic(world)
    committed = _settle(traffic, set(found.values()))
    assert set(found.values()) == committed, _differ(set(found.values()), committed, "in the topic")
    assert len(found) == len(committed), "the producer doubled messages"
    batches = dict(_batches(world.store()))
    by_batch = [list(_rows(world.store(), ref)) for ref in batches.values()]
    rows = [row for of_batch in by_batch for row in of_batch]
    places = [(row["_partition"], row["_offset"]) for _, row in rows]
    assert len(set(places)) == len(places), f"twice: {sorted(p for p in set(places) if places.count(p) > 1)[:5]}"
    assert set(places) == set(found), _differ(set(places), set(found), "in the batches")
    for of_batch in by_batch:
        _check_rows(of_batch, found)
    claims = _check_claims(world, run_keys, batches, ends)
    assert _published(world) == ends, "the last batch publishes every topic partition's end"
    kept = [table for table, _ in rows]
    return Proof(
        len(committed),
        len(traffic.aborted),
        kept.count(ACCEPTED),
        kept.count(QUARANTINE),
        sum(row["_reasons"][0].startswith("not_unique:") for table, row in rows if table == QUARANTINE),
        len(claims),
        sum(_is_cut(world.store(), ref) for ref in batches.values()),
        len(batches) - len(claims),
        _check_files(world.store(), batches.values()),
    )


def _settle(traffic: Traffic, found: set[int]) -> set[int]:
    """What was committed, with the transactions over which the broker died: each is there as a whole or not at all."""
    torn = [bound for bound in traffic.unsettled if bound & found and bound - found]
    assert not torn, f"the broker tore transactions apart: {torn}"
    return traffic.committed.union(*(bound for bound in traffic.unsettled if bound <= found))


def _read_topic(world: World) -> tuple[dict[int, int], dict[Place, int]]:
    """Each topic partition's end, and the number of the message at each place."""
    consumer = _consumer(world, group="proof")
    parts = [TopicPartition(world.topic, p, 0) for p in range(PARTITIONS)]
    ends = {p.partition: consumer.get_watermark_offsets(p, timeout=10)[1] for p in parts}
    consumer.assign(parts)
    found: dict[Place, int] = {}
    open_parts = {p for p, end in ends.items() if end}
    while open_parts:
        for record in consumer.consume(1000, 0.2):
            if record.error() is None:
                found[record.partition(), record.offset()] = int(record.key())
            else:  # the end of a topic partition
                open_parts.discard(record.partition())
    consumer.close()
    return ends, found


def _published(world: World) -> dict[int, int]:
    consumer = _consumer(world, group=world.group)
    held = consumer.committed([TopicPartition(world.topic, p) for p in range(PARTITIONS)], timeout=10)
    consumer.close()
    return {p.partition: p.offset for p in held}


def _consumer(world: World, group: str) -> Consumer:
    quick = {"fetch.wait.max.ms": 50, "fetch.queue.backoff.ms": 1}
    return Consumer({"bootstrap.servers": world.bootstrap, "group.id": group, "enable.partition.eof": True, **quick})


def _batches(store: Store) -> Iterator[tuple[str, BatchRef]]:
    for folder in sorted(Path(store.root, PIPELINE, "batch").iterdir()):
        ref = store.find(PIPELINE, "batch", folder.name)
        if ref is not None:
            yield folder.name, ref


def _rows(store: Store, ref: BatchRef) -> Iterator[tuple[str, dict[str, Any]]]:
    count = 0
    for table in (ACCEPTED, QUARANTINE):
        for part in store.read(ref, table):
            count += part.num_rows
            yield from ((table, row) for row in part.to_pylist())
    assert count == ref.counts["read"], f"{ref.batch_id} says {ref.counts} and has {count} rows"


def _is_cut(store: Store, ref: BatchRef) -> bool:
    """True when several shards have parts of the batch."""
    return len({part.path.rpartition("/")[2][:4] for part in store.manifest(ref).parts if "-of-" in part.path}) > 1


def _check_rows(rows: Collection[tuple[str, dict[str, Any]]], found: Mapping[Place, int]) -> None:
    """Hold all rows of one batch against the messages; what must be unique must be so in the batch."""
    numbers = [found[row["_partition"], row["_offset"]] for _, row in rows]
    times = Counter(unique(number) for number in numbers if message(number)[1] is None)
    for (table, row), number in zip(rows, numbers, strict=True):
        _check_row(table, row, number, "not_unique" if times[unique(number)] > 1 else None)


def _check_row(table: str, row: Mapping[str, Any], number: int, doubled: str | None) -> None:
    payload, code = message(number)
    code = code or doubled
    assert int(row["_key"]) == number, f"message {number} came as {row}"
    if code is None:
        assert table == ACCEPTED, f"message {number} is good: {row}"
        assert (row["n"], row["v"], row["u"]) == (number, number % 100, unique(number))
    else:
        assert table == QUARANTINE, f"message {number} is bad ({code}): {row}"
        assert row["_payload"] == payload, f"message {number} has other bytes: {row['_payload']!r}"
        assert row["_reasons"][0].startswith(f"{code}:"), f"message {number}: {row['_reasons']}"


def _check_claims(
    world: World, run_keys: Collection[str], batches: Mapping[str, BatchRef], ends: Mapping[int, int]
) -> list[Claim]:
    """Every claim has landed the batch that lies there, and claims side by side fill the topic."""
    ledger = world.ledger()
    claims = [claim for key in run_keys if (claim := ledger.claim_of(PIPELINE, key))]
    store = world.store()
    for claim in claims:
        assert claim.state == "landed", f"{claim.run_key} still only claims {claim.span}"
        assert batches.get(claim.span.batch_id) == claim.ref, f"{claim.run_key} landed another batch than lies there"
        assert store.manifest(claim.ref).facts["span"] == claim.span.to_dict()
    named = {claim.span.batch_id for claim in claims}
    others = [ref for name, ref in batches.items() if name not in named]
    assert all(ref.counts["read"] == 0 for ref in others), f"batches that nobody claimed: {others}"
    for partition, end in ends.items():
        taken = sorted((s.first, s.end) for c in claims for s in c.span.slices if s.partition == str(partition))
        bounds = [0, *(edge for pair in taken for edge in pair), end]
        assert bounds[::2] == bounds[1::2], f"topic partition {partition}: gaps or overlaps between {taken}"
    return claims


def _check_files(store: Store, refs: Collection[BatchRef]) -> int:
    """Every file is named by a landed manifest or was being written aside; returns how many of the latter lie there."""
    named = {f"{ref.uri}/{part.path}" for ref in refs for part in store.manifest(ref).parts}
    named |= {f"{ref.uri}/{MANIFEST}" for ref in refs}
    lying = {str(path) for path in Path(store.root).rglob("*") if path.is_file()}
    assert named <= lying
    # a zombie that is killed after its successor has landed may leave marks behind, and parts that were rewritten since
    late = {f"{ref.uri}/{path}" for ref in refs for path in superseded(store.manifest(ref).parts)}
    stray = [path for path in lying - named - late if not path.endswith(".aside") and "/shards/" not in path]
    assert not stray, f"files that no manifest names: {sorted(stray)[:5]}"
    return len(lying - named)


def _differ(found: set[Any], wanted: set[Any], where: str) -> str:
    return f"{where}: missing {sorted(wanted - found)[:5]}, and not expected {sorted(found - wanted)[:5]}"
