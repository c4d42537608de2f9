"""Dead letters on a real broker: each quarantined row once, with its bytes, whatever is killed and whenever."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk import DAG
from confluent_kafka import Consumer, TopicPartition

from airflow_ai_provider import FileSource, KafkaSink, ValidatedIngestOperator
from airflow_ai_provider.core.batch import BatchRef
from airflow_ai_provider.core.ingest import dead_letter
from airflow_ai_provider.core.ingest.dead_letter import send_letters
from airflow_ai_provider.core.ingest.flow import IngestRun, ingest
from airflow_ai_provider.core.ingest.replay import replay_quarantine
from airflow_ai_provider.core.ledger import Claim
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SourceError, SourceUnavailableError
from airflow_ai_provider.testing import MemoryLedger, MemorySource, RuleValidator
from tests.core.ingest.cutting import cut_ingest

if TYPE_CHECKING:
    from tests.servers.kafka import KafkaBroker

pytestmark = pytest.mark.integration

RULES = RuleValidator(lambda row: None if row["n"] % 2 else f"out_of_range: {row['n']} is even", {"n": "int64"})
_numbers = itertools.count()


class World:
    """A landed batch with six rejected rows of ten, and an empty dead-letter topic."""

    def __init__(self, folder: Path, broker: KafkaBroker, shards: int = 1, **topic_config: str) -> None:
        self.store, self.ledger = Store(f"{folder}/store"), open_ledger(f"sqlite:///{folder}/ledger.db")
        self.broker, self.topic = broker, broker.create_topic(f"dead-{next(_numbers)}", 2, dict(topic_config))
        self.config = {"bootstrap.servers": broker.bootstrap, "reconnect.backoff.max.ms": 500, "group.id": "g"}
        rows = [json.dumps({"n": n}).encode() for n in range(8)] + [b"{broken \xff", None]
        self.payloads = {f"rows~memory-1/0/{at}": row for at, row in enumerate(rows)}
        source = MemorySource({0: rows})
        run = IngestRun("p", "r1", "r1/ingest")
        self.ref = cut_ingest(source, RULES, self.store, self.ledger, run, shards=shards)
        self.rejected = {f"rows~memory-1/0/{n}" for n in (0, 2, 4, 6, 8, 9)}

    @property
    def claim(self) -> Claim:
        return self.ledger.claims("p", "landed")[0]

    def send(self, ledger: Any = None) -> int:
        return send_letters(self.store, ledger or self.ledger, self.claim, self.topic, self.config, patience_s=60)

    def letters(self) -> list[Any]:
        """All letters that a reader of committed records sees."""
        self.broker.wait_until_stable(self.topic)
        reader = Consumer({**self.config, "group.id": "reader", "enable.partition.eof": True, "isolation.level": "read_committed"})  # noqa: E501  # fmt: skip
        reader.assign([TopicPartition(self.topic, p, 0) for p in (0, 1)])
        found, ends = [], 0
        while ends < 2:
            message = reader.poll(60)
            assert message is not None, "the broker does not answer"
            ends += message.error() is not None
            found += [message] if message.error() is None else []
        reader.close()
        return found

    def demand_each_once(self) -> None:
        found = self.letters()
        told = [(dict(m.headers())["ai.row_id"].decode(), m.value()) for m in found]
        assert sorted(row_id for row_id, _ in told) == sorted(self.rejected)
        assert dict(told) == {row_id: self.payloads[row_id] for row_id in self.rejected}


@pytest.fixture
def world(kafka_broker: KafkaBroker, tmp_path: Path) -> World:
    return World(tmp_path, kafka_broker)


def test_a_letter_has_the_rows_bytes_and_says_why(world: World) -> None:
    assert world.send() == 6
    world.demand_each_once()
    broken = next(dict(m.headers()) for m in world.letters() if m.value() == b"{broken \xff")
    told = {name: value.decode() for name, value in broken.items()}
    assert told["ai.stage"] == "decode"
    assert json.loads(told["ai.reasons"])[0].startswith("broken_json: ")
    assert (told["ai.pipeline"], told["ai.run_id"], told["ai.batch_id"]) == ("p", "r1", world.ref.batch_id)
    assert (told["ai.partition"], told["ai.offset"]) == ("0", "8")
    assert world.send() == 0
    world.demand_each_once()


class CrashingLedger:
    """Fails where a process could die: after the letters are committed, before that is noted."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)

    def lettered(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_a_crash_before_the_mark_sends_nothing_again(world: World) -> None:
    with pytest.raises(KeyboardInterrupt):
        world.send(CrashingLedger(world.ledger))
    assert world.send() == 0
    world.demand_each_once()


_KILLED = """
import os, signal, sys
from confluent_kafka import Producer
from airflow_ai_provider.core.ingest import dead_letter
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
folder, topic, bootstrap, at = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
dead_letter._LETTERS = 2
done = 0
def step(name):
    global done
    done += 1
    if done == at:
        os.kill(os.getpid(), signal.SIGKILL)
class Dying(Producer):
    def begin_transaction(self, *a): step("begin"); return super().begin_transaction(*a)
    def flush(self, *a): found = super().flush(*a); step("flush"); return found
    def send_offsets_to_transaction(self, *a): super().send_offsets_to_transaction(*a); step("offsets")
    def commit_transaction(self, *a): super().commit_transaction(*a); step("commit")
dead_letter.Producer = Dying
ledger = open_ledger(f"sqlite:///{folder}/ledger.db")
claim, config = ledger.claims("p", "landed")[0], {"bootstrap.servers": bootstrap}
dead_letter.send_letters(Store(f"{folder}/store"), ledger, claim, topic, config)
"""


@pytest.mark.parametrize(("at", "shards"), [(2, 1), (3, 5), (4, 1), (7, 5), (11, 5)])
def test_a_kill_at_any_step_neither_loses_nor_doubles_a_letter(
    kafka_broker: KafkaBroker, tmp_path: Path, at: int, shards: int
) -> None:
    world = World(tmp_path, kafka_broker, shards)
    bootstrap = str(world.config["bootstrap.servers"])
    command = [sys.executable, "-c", _KILLED, str(tmp_path), world.topic, bootstrap, str(at)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert world.send() == 6 - 2 * (at // 4)
    world.demand_each_once()


def test_a_replays_rejected_rows_are_letters_of_their_own(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    world = World(tmp_path, kafka_broker, shards=5)
    assert world.send() == 6
    again = {f"rows~memory-1/0/{n}": {"n": n + 1 if n < 8 else 100} for n in (0, 2, 8)}
    for _ in range(2):  # rows 0 and 2 are odd now, row 8 is mended and even
        ref = replay_quarantine(world.store, world.ledger, RULES, world.ref, pipeline="p", corrections=again)
        assert ref.counts == {"read": 3, "accepted": 2, "quarantined": 1}
        claim = next(claim for claim in world.ledger.claims("p", "landed") if claim.ref == ref)
        send_letters(world.store, world.ledger, claim, world.topic, world.config)
    assert world.send() == 0
    letters = [(dict(m.headers()), m.value()) for m in world.letters()]
    assert len(letters) == 7
    (new,) = [value for told, value in letters if told["ai.batch_id"] == ref.batch_id.encode()]
    assert new == b'{"n":100}'


def test_a_letter_that_is_too_large_leaves_its_bytes_behind(
    kafka_broker: KafkaBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, kafka_broker, **{"max.message.bytes": "2000"})
    large = b'{"n": "' + b"x" * 5000 + b'"}'
    rows = [b'{"n": "%d"}' % n for n in range(20)] + [large]
    ref = ingest(MemorySource({0: rows}, name="b"), RULES, world.store, world.ledger, IngestRun("p", "r2", "r2/i"))
    claim = world.ledger.claims("p", "landed")[1]
    assert claim.ref == ref
    assert send_letters(world.store, world.ledger, claim, world.topic, world.config) == 21
    found = world.letters()
    assert sorted(m.value() for m in found if m.value()) == sorted(rows[:20])  # small ones that travelled with it
    (cut,) = [dict(m.headers()) for m in found if m.value() is None]
    assert cut["ai.payload_bytes_left_out"] == str(len(large)).encode()


def test_a_dead_broker_is_told_and_the_retry_sends_the_rest(
    world: World, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter, "_LETTERS", 2)
    sent = dead_letter.Courier.send

    def send_once(self: Any, letters: Any) -> None:
        sent(self, letters)
        kafka_broker.pause()
        self._patience_s = 2

    monkeypatch.setattr(dead_letter.Courier, "send", send_once)
    with pytest.raises(SourceUnavailableError, match=r"2 of its 6 quarantined rows .* sends only the others"):
        world.send()
    kafka_broker.resume()
    monkeypatch.setattr(dead_letter.Courier, "send", sent)
    assert world.send() == 4
    world.demand_each_once()


def test_no_topic_no_letters_nothing_to_send(world: World) -> None:
    with pytest.raises(SourceError, match="there is no topic absent"):
        send_letters(world.store, world.ledger, world.claim, "absent", world.config)
    ledger = MemoryLedger()
    ref = BatchRef("batch", "b", "u", "sha256:0", {"read": 1, "accepted": 1, "quarantined": 0})
    assert send_letters(world.store, ledger, Claim("p", "k", world.claim.span, "landed", ref, "r"), "absent", {}) == 0


def test_the_operator_sends_what_it_has_landed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, extra in (
        ("kafka", world.config),
        ("ai_store", {"uri": f"{tmp_path}/other"}),
        ("ai_ledger", {"url": f"sqlite:///{tmp_path}/other.db"}),
    ):
        monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}_DEFAULT", json.dumps({"conn_type": name, "extra": extra}))
    (tmp_path / "in.jsonl").write_text('{"n": 1}\n{broken\n')
    source = FileSource(str(tmp_path / "in.jsonl"))
    ingest = ValidatedIngestOperator(task_id="ingest", dag=DAG("p"), source=source, dead_letters=KafkaSink(world.topic))
    dag_run = SimpleNamespace(run_id="r", run_type="manual", data_interval_start=None, data_interval_end=None)
    context = {"ti": SimpleNamespace(dag_id="p", task_id="ingest", map_index=-1), "dag_run": dag_run, "params": {}}
    for _ in range(2):
        assert ingest.execute(context)["counts"]["quarantined"] == 1
    (letter,) = world.letters()
    told = dict(letter.headers())
    assert letter.value() == b"{broken"
    assert letter.key() == told["ai.row_id"]
    assert told["ai.row"] == b"1"
