"""What the examples are made of: the same on every machine, and never a look at what is unseen."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from include.data import biopsies, biopsy_records, digits, write_digits
from include.expectations.derive import SUITE, biopsy_suite
from include.messages import KINDS, SPOILED_OF_EACH, make_messages, publish
from include.models.train_triage import register, train

PIXELS = 8


def test_the_halves_share_no_row_and_leave_none_out() -> None:
    for (learn, unseen), counts in ((biopsies(), (284, 285)), (digits(), (898, 899))):
        assert (len(learn.labels), len(unseen.labels)) == counts
        assert sorted([*learn.numbers, *unseen.numbers]) == list(range(sum(counts)))


def test_the_suite_is_what_the_learning_half_says_and_rejects_no_unseen_biopsy() -> None:
    assert json.loads(SUITE.read_text()) == biopsy_suite()
    rules = [e["kwargs"] for e in biopsy_suite()["expectations"] if e["type"].endswith("between")]
    assert len(rules) == 30
    for record, _ in biopsy_records():
        assert all(rule["min_value"] <= record[rule["column"]] <= rule["max_value"] for rule in rules)


def test_messages_are_spoiled_alike_each_time_and_differ_from_the_good_ones() -> None:
    messages = make_messages()
    assert messages == make_messages()
    assert messages != make_messages(seed=2)
    assert Counter(m.kind for m in messages if m.kind) == dict.fromkeys(KINDS, SPOILED_OF_EACH)
    good = {record["biopsy_id"]: record for record, _ in biopsy_records()}
    for message in messages:
        if message.kind == "broken_json":
            with pytest.raises(json.JSONDecodeError):
                json.loads(message.value)
        else:
            assert (json.loads(message.value) == good[message.biopsy_id]) is not bool(message.kind)


def test_what_is_published_lies_where_the_broker_says(mock_kafka: str) -> None:
    from confluent_kafka import Consumer, TopicPartition

    client = {"bootstrap.servers": mock_kafka}
    delivered = publish(client, "material", make_messages(), lambda _: None)
    consumer = Consumer({**client, "group.id": "material", "enable.auto.commit": False})
    try:
        for one in delivered[::40]:
            consumer.assign([TopicPartition("material", one.partition, one.offset)])
            found = consumer.poll(15)
            assert found is not None
            assert (found.offset(), found.value(), found.key()) == (
                one.offset,
                one.message.value,
                one.message.biopsy_id.encode(),
            )
    finally:
        consumer.close()


def test_scans_hold_the_pixels_and_their_names_give_no_digit_away(tmp_path: Path) -> None:
    from PIL import Image

    assert write_digits(tmp_path / "scans", tmp_path / "truth.json") == 899
    _, unseen = digits()
    labels = json.loads((tmp_path / "truth.json").read_text())
    for number, pixels, label in list(zip(unseen.numbers, unseen.rows, unseen.labels, strict=True))[::100]:
        name = f"scan-{number:04d}.png"
        with Image.open(tmp_path / "scans" / name) as scan:
            assert (scan.mode, scan.size) == ("L", (PIXELS, PIXELS))
            assert np.abs(np.asarray(scan) / 255 - pixels / 16).max() < 0.002
        assert labels[name] == str(label)


@pytest.mark.slow
def test_training_again_gives_the_same_model_and_registers_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts when there is no server
    registry = f"sqlite:///{tmp_path}/mlflow.db"
    trained = train()
    assert trained.digest == train().digest != train("timid").digest
    import mlflow

    before = mlflow.get_tracking_uri()
    try:
        assert register(trained, registry) == register(train(), registry) == "1"
        assert register(train("timid"), registry, alias="") == "2"
        aliases = mlflow.MlflowClient(registry, registry).get_registered_model("triage").aliases
    finally:
        mlflow.set_tracking_uri(before)
    assert {name: str(version) for name, version in aliases.items()} == {"champion": "1"}
