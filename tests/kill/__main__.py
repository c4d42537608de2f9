"""``make kill``: hundreds of kills, on SQLite and on PostgreSQL, with kills of the broker between."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.kill.story import tell
from tests.servers.kafka import KafkaBroker
from tests.servers.postgres import PostgresServer


def main() -> None:
    """Run the story once per kind of ledger and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broker-kills", type=int, default=5)
    parser.add_argument("--shards", type=int, default=4, help="of a batch at the most; 1: one task ingests it")
    parser.add_argument("--ledger", choices=["sqlite", "postgresql", "both"], default="both")
    asked = parser.parse_args()
    broker = KafkaBroker()
    try:
        for kind in ("sqlite", "postgresql") if asked.ledger == "both" else (asked.ledger,):
            with tempfile.TemporaryDirectory(prefix="kill-") as name:
                postgres = PostgresServer() if kind == "postgresql" else None
                url = postgres.fresh_url() if postgres else f"sqlite:///{name}/ledger.db"
                try:
                    outcome = tell(
                        broker,
                        Path(name),
                        url,
                        seed=asked.seed,
                        kills=asked.kills,
                        broker_kills=asked.broker_kills,
                        shards=asked.shards,
                    )
                finally:
                    if postgres:
                        postgres.close()
                print(f"{kind}, at most {asked.shards} shards, seed {asked.seed}: {outcome}", flush=True)
    finally:
        broker.close()


if __name__ == "__main__":
    main()
