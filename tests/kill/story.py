"""The whole story once: fill a topic, kill what ingests it, drain it, prove that nothing is lost or doubled."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from tests.kill.proof import Proof, prove
from tests.kill.rounds import Rounds, Tally
from tests.kill.traffic import PARTITIONS, Traffic
from tests.kill.worker import World
from tests.servers.kafka import KafkaBroker

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Outcome:
    """What was done and what it proved."""

    tally: Tally
    proof: Proof
    took_s: float

    def __str__(self) -> str:
        p = self.proof
        return (
            f"{self.tally}. In {self.took_s:.0f} s, {p.committed} committed messages ({p.aborted} aborted ones beside "
            f"them) became {p.accepted} accepted and {p.quarantined} quarantined rows ({p.doubled} of them doubles) of "
            f"{p.batches} batches, {p.cut} of several shards: none lost, none twice, none aborted; "
            f"{p.empty_batches} empty batches, {p.asides} files left aside by the dead"
        )


def tell(
    broker: KafkaBroker,
    folder: Path,
    ledger_url: str,
    *,
    seed: int,
    kills: int,
    broker_kills: int = 0,
    shards: int = 1,
) -> Outcome:
    """Kill so many tasks (and the broker so many times between), then prove.

    :param folder: empty; takes the store.
    :param ledger_url: an empty database.
    :param shards: into how many pieces a batch is cut at the most, each ingested by a task of its own.
    """
    begun = time.monotonic()
    topic = broker.create_topic(f"kill-{next(_numbers)}-{seed}", PARTITIONS)
    world = World(
        broker.bootstrap, topic, f"group-{topic}", str(folder / "store"), ledger_url, str(folder / "faults.txt")
    )
    traffic = Traffic(broker.bootstrap, topic, seed)
    rounds = Rounds(world, seed, shards)
    traffic.start()
    try:
        rounds.warm_up()
        rounds.kill(kills // 2)
        for _ in range(broker_kills):
            rounds.kill_broker(broker)
        rounds.kill(kills)
    finally:
        traffic.stop()
    rounds.drain()
    traffic.send_last()
    rounds.drain()
    return Outcome(rounds.tally, prove(world, traffic, rounds.run_keys), time.monotonic() - begun)
