"""Rows through a model server that is well: four protocols, many requests at once, each row once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.infer.remote.client import open_remote, probe_server
from airflow_ai_provider.core.infer.remote.endpoint import PROTOCOLS, RemoteEndpoint
from airflow_ai_provider.errors import SignatureError, SpecError
from tests.core.infer.dense import tensor_signature
from tests.core.infer.model_server import (
    PIN,
    TOO_LARGE,
    FakeServer,
    Refused,
    Rows,
    high_or_low,
    rows_of,
    serving,
    with_x,
)


@pytest.fixture(params=[*PROTOCOLS, "oip binary"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    protocol, _, binary = request.param.partition(" ")
    with serving(protocol=protocol, binary=bool(binary)) as made:
        yield made


def test_every_row_once_in_order_with_the_model_s_own_numbers(fake: FakeServer) -> None:
    rows = rows_of(333)
    expected = high_or_low(np.stack([rows["x"].to_numpy(), rows["y"].to_numpy()], axis=1))
    with open_remote(PIN, fake.endpoint()) as engine:
        fake.seen.clear()
        predicted = engine.predict(rows, 50)
    assert sorted(fake.seen) == [33, 50, 50, 50, 50, 50, 50]
    assert predicted[ROW_ID].equals(rows[ROW_ID])
    assert predicted["prediction"].to_pylist() == expected["label"].tolist()
    assert predicted["error"].null_count == 333
    np.testing.assert_allclose(predicted["probabilities"].to_pylist(), expected["probabilities"], atol=1e-6)


def test_rows_that_are_refused_are_row_errors_with_the_server_s_words(fake: FakeServer) -> None:
    rows = with_x(rows_of(200), {3: 5000.0, 77: 1e6, 78: 2000.0, 150: None, 199: 1001.0})
    with open_remote(PIN, fake.endpoint()) as engine:
        predicted = engine.predict(rows, 64).to_pylist()
        well = engine.predict(rows_of(200), 64).to_pylist()
    refused = [i for i, line in enumerate(predicted) if line["error"]]
    assert refused == [3, 77, 78, 150, 199]
    assert predicted[77]["error"] == "refused: 400: a number is larger than 1000"
    assert predicted[150]["error"].startswith("null_value: x is null")
    assert [p for i, p in enumerate(predicted) if i not in refused] == [
        p for i, p in enumerate(well) if i not in refused
    ]


def test_names_of_classes_and_logits_are_read_as_by_every_engine(fake: FakeServer) -> None:
    fake.model = lambda rows: {"scores": np.stack([-rows.sum(axis=1), rows.sum(axis=1)], axis=1).astype(np.float64)}
    pin = replace(PIN, metadata={"classes": ["low", "high"], "scores": "logits"})
    with open_remote(pin, fake.endpoint()) as engine:
        predicted = engine.predict(rows_of(20), 7).to_pylist()
    for line, row in zip(predicted, rows_of(20).to_pylist(), strict=True):
        total = row["x"] + row["y"]
        assert line["prediction"] == ("high" if total > 0 else "low")
        assert line["score"] == pytest.approx(1 / (1 + np.exp(-2 * abs(total))), abs=1e-5)


def test_a_number_per_row(fake: FakeServer) -> None:
    fake.model = lambda rows: {"total": rows.sum(axis=1)}
    with open_remote(PIN, fake.endpoint()) as engine:
        predicted = engine.predict(rows_of(20), 7)
    expected = np.add(rows_of(20)["x"].to_numpy(), rows_of(20)["y"].to_numpy())
    np.testing.assert_allclose(predicted["prediction"].to_numpy(), expected, rtol=1e-6, atol=1e-6)
    assert predicted["score"].null_count == 20


def test_a_tensor_per_row(fake: FakeServer) -> None:
    """The signature names no columns: the model's metadata does."""
    pin = replace(PIN, signature=tensor_signature(2), metadata={"features": ["x", "y"]})
    with open_remote(pin, fake.endpoint()) as engine:
        assert engine.needs(rows_of(1).schema) == ["x", "y"]
        predicted = engine.predict(rows_of(30), 8)
    with open_remote(PIN, fake.endpoint()) as engine:
        expected = engine.predict(rows_of(30), 8)
    assert predicted["prediction"].equals(expected["prediction"])


def test_many_at_once_but_no_more_than_allowed() -> None:
    def slow(rows: Rows) -> dict[str, Rows]:
        time.sleep(0.02)
        return high_or_low(rows)

    with serving(model=slow) as fake, open_remote(PIN, fake.endpoint(in_flight=5)) as engine:
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda seed: engine.predict(rows_of(200, seed), 10), (1, 2)))
        assert fake.most_at_once == 5
        for seed, predicted in zip((1, 2), both, strict=True):
            assert predicted.equals(engine.predict(rows_of(200, seed), 10))


def test_a_server_that_takes_fewer_rows_at_a_time_is_learned_once() -> None:
    def small(rows: Rows) -> dict[str, Rows]:
        if len(rows) > 16:
            raise Refused(400, "inference request batch-size must be <= 16")
        return high_or_low(rows)

    with serving(model=small) as fake, open_remote(PIN, fake.endpoint(in_flight=1)) as engine:
        first = engine.predict(rows_of(640), 64)
        assert first["error"].null_count == 640
        fake.seen.clear()
        assert engine.predict(rows_of(640), 64).equals(first)
        assert set(fake.seen) == {16}


def test_credentials_go_with_every_request_and_into_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with serving() as fake:
        fake.script.append(lambda handler: handler.answer(503, {"error": handler.headers["Authorization"]}))
        headers = {"Authorization": "Bearer s3cret-token", "X-Team": "oncology"}
        with open_remote(PIN, fake.endpoint(), headers) as engine:
            refusal = {"error": "no: Bearer s3cret-token"}
            # once among others, once alone: only then it is the row's own
            fake.script.extend([lambda handler: handler.answer(400, refusal)] * 2)
            predicted = engine.predict(rows_of(1), 1)
        assert all(seen["Authorization"] == "Bearer s3cret-token" for seen in fake.headers)
    assert predicted["error"].to_pylist() == ["refused: 400: no: ***"]
    assert "s3cret" not in caplog.text


def test_rows_are_not_blamed_for_others_that_the_server_predicts_with_them() -> None:
    """Servers put requests that come together into one call of the model: then all of them are refused for one row."""
    lock, spoiling = threading.Lock(), [0]

    def together(rows: Rows) -> dict[str, Rows]:
        mine = int((rows > TOO_LARGE).any())
        with lock:
            spoiling[0] += mine
            spoilt = spoiling[0]
        time.sleep(0.005)
        with lock:
            spoilt += spoiling[0]
            spoiling[0] -= mine
        if spoilt:
            raise Refused(500, "one of these rows")
        return high_or_low(rows)

    rows = with_x(rows_of(200), {3: 5000.0, 77: 1e6, 78: 2000.0})
    with serving(model=together) as fake, open_remote(PIN, fake.endpoint()) as engine:
        errors = engine.predict(rows, 10)["error"].to_pylist()
    assert [i for i, error in enumerate(errors) if error] == [3, 77, 78]


def test_the_sample_is_refused_before_the_first_row() -> None:
    with serving() as fake:
        fake.script.append(lambda handler: handler.answer(400, {"error": "unexpected shape for input 'x'"}))
        with pytest.raises(SignatureError, match="unexpected shape for input 'x'"):
            open_remote(PIN, fake.endpoint())


def test_outputs_that_are_asked_for() -> None:
    def many(rows: Rows) -> dict[str, Rows]:
        return {"embedding": np.zeros((len(rows), 8)), **high_or_low(rows)}

    with serving(protocol="mlflow", model=many) as fake:
        with open_remote(PIN, fake.endpoint(outputs=("label", "probabilities"))) as engine:
            assert engine.predict(rows_of(5), 5)["score"].null_count == 0
        with pytest.raises(
            SignatureError, match=r"\['embedding', 'label', 'probabilities'\], asked for are \['nope'\]"
        ):
            open_remote(PIN, fake.endpoint(outputs=("nope",)))


def test_the_probe_says_what_answers(fake: FakeServer) -> None:
    assert probe_server(fake.endpoint()).startswith(f"http://127.0.0.1:{fake.port} answers with ")


def test_an_endpoint_is_checked_with_all_its_faults() -> None:
    with pytest.raises(SpecError) as caught:
        RemoteEndpoint("grpc", "http://me:pw@host", timeout_s=0, in_flight=-1)
    assert [name for name, _ in caught.value.faults] == ["protocol", "url", "timeout_s", "in_flight"]
    assert "pw" not in str(caught.value)
    with pytest.raises(SpecError) as caught:
        RemoteEndpoint.from_dict({"url": "http://h", "in_flight": "many", "speed": 1})
    assert sorted(name for name, _ in caught.value.faults) == ["in_flight", "protocol", "speed"]


@pytest.mark.parametrize(
    "url", ["", "host:80", "ftp://h", "http://", "http://h?x=1", "http://h#x", "http://h:0x", "http://h h"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(SpecError, match="url"):
        RemoteEndpoint("oip", url)


def test_an_endpoint_survives_a_round_trip() -> None:
    endpoint = RemoteEndpoint("oip", "https://h/models/", model="m", outputs=("a", "b"), batch_size=7)
    assert endpoint.url == "https://h/models"
    assert RemoteEndpoint.from_dict(endpoint.to_dict()) == endpoint
    texts = {
        "protocol": "oip",
        "url": "https://h/models",
        "model": "m",
        "outputs": "a, b",
        "batch_size": "7",
        "version": "",
    }
    assert RemoteEndpoint.from_dict(texts) == endpoint
