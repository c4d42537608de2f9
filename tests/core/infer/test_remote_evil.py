"""Model servers that hang, cut, lie, refuse or serve something else: no row is lost, doubled or guessed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from airflow_ai_provider.core.infer.remote.client import open_remote, probe_server
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.errors import (
    AiProviderError,
    ConnectionConfigError,
    EngineUnavailableError,
    ModelPinError,
    RowMismatchError,
)
from tests.core.infer.model_server import PIN, Handler, Refused, Rows, high_or_low, rows_of, serving, with_x

Fault = Callable[[Handler], None]
ROWS = rows_of(120)


def hang(handler: Handler) -> None:
    time.sleep(0.8)
    handler.cut()


def cut(handler: Handler) -> None:
    handler.cut()


def half_answer(handler: Handler) -> None:
    handler.cut(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"outputs": [')


def half_head(handler: Handler) -> None:
    handler.cut(b"HTTP/1.1 20")


def no_http(handler: Handler) -> None:
    handler.cut(b"SSH-2.0-OpenSSH\r\n\r\n")


def busy(handler: Handler) -> None:
    handler.answer(503, {"error": "no free worker"}, {"Retry-After": "0.05"})


def too_many(handler: Handler) -> None:
    handler.answer(429, b"slow down", {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"})


def gateway(handler: Handler) -> None:
    handler.answer(502, b"<html>bad gateway</html>")


@pytest.mark.parametrize("fault", [hang, cut, half_answer, half_head, no_http, busy, too_many, gateway])
def test_a_fault_that_passes_changes_nothing(fault: Fault) -> None:
    timeout_s = 0.5 if fault is hang else 30
    with serving() as fake, open_remote(PIN, fake.endpoint(in_flight=2, timeout_s=timeout_s)) as engine:
        expected = engine.predict(ROWS, 30)
        fake.script.extend([fault, fault, fault])
        assert engine.predict(ROWS, 30).equals(expected)
        assert not fake.script


@pytest.mark.parametrize("fault", [hang, cut, half_answer, busy])
def test_a_fault_that_stays_is_unavailable_within_the_patience(fault: Fault) -> None:
    with serving() as fake, open_remote(PIN, fake.endpoint(timeout_s=0.7, patience_s=2)) as engine:
        fake.script.extend([fault] * 500)
        began = time.monotonic()
        with pytest.raises(EngineUnavailableError, match="does not answer: .* Asked [0-9]+ times in 2 s"):
            engine.predict(ROWS, 30)
        assert time.monotonic() - began < 30


def test_a_server_that_asks_for_more_time_than_there_is() -> None:
    def tomorrow(handler: Handler) -> None:
        handler.answer(503, {"error": "later"}, {"Retry-After": "86400"})

    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.script.extend([tomorrow] * 50)
        began = time.monotonic()
        with pytest.raises(EngineUnavailableError, match="503: later"):
            engine.predict(ROWS, 30)
        assert time.monotonic() - began < 30


def test_nobody_listens() -> None:
    with serving() as fake:
        endpoint = fake.endpoint(patience_s=0.5)
    with pytest.raises(EngineUnavailableError, match="does not answer"):
        open_remote(PIN, endpoint)
    with pytest.raises(EngineUnavailableError, match="Check host and port"):
        probe_server(endpoint)
    assert not [thread for thread in threading.enumerate() if thread.name == "model-server"], "threads are left behind"


def test_a_server_that_comes_back_while_it_is_asked() -> None:
    with serving() as fake:
        endpoint = fake.endpoint()
        with open_remote(PIN, endpoint) as engine:
            expected = engine.predict(ROWS, 30)
    # The port is closed now; it is opened again in a moment.
    opened, over = threading.Event(), threading.Event()

    def reopen() -> None:
        time.sleep(0.4)
        with serving(at=fake.port):
            opened.set()
            over.wait(120)

    thread = threading.Thread(target=reopen)
    thread.start()
    with open_remote(PIN, endpoint) as engine:
        assert opened.is_set()
        assert engine.predict(ROWS, 30).equals(expected)
    over.set()
    thread.join()


def first_output(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        change(answer["outputs"][0])
        return answer

    return spoil


def drop_a_row(output: dict[str, Any]) -> None:
    output["shape"] = [output["shape"][0] - 1, *output["shape"][1:]]
    output["data"] = output["data"][: int(np.prod(output["shape"]))]


def add_a_row(output: dict[str, Any]) -> None:
    output["data"] += output["data"][:1]
    output["shape"] = [output["shape"][0] + 1]


def other_shape(output: dict[str, Any]) -> None:
    output["shape"] = [*output["shape"], 1, 1]


def shape_that_lies(output: dict[str, Any]) -> None:
    output["shape"] = [7, 7]


def no_data(output: dict[str, Any]) -> None:
    del output["data"]


def other_name(output: dict[str, Any]) -> None:
    output["name"] = "score"


def texts(output: dict[str, Any]) -> None:
    output |= {"datatype": "BYTES", "data": ["high"] * len(output["data"])}


def fractions(output: dict[str, Any]) -> None:
    output |= {"datatype": "FP64", "data": [0.5] * len(output["data"])}


def unknown_type(output: dict[str, Any]) -> None:
    output["datatype"] = "BF16"


@pytest.mark.parametrize(
    "change",
    [drop_a_row, add_a_row, other_shape, shape_that_lies, no_data, other_name, texts, fractions, unknown_type],
)
def test_an_answer_of_other_rows_is_a_mismatch(change: Callable[[dict[str, Any]], None]) -> None:
    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.spoil = first_output(change)
        with pytest.raises(RowMismatchError, match="Nothing was landed|nothing was landed"):
            engine.predict(ROWS, 30)


@pytest.mark.parametrize("protocol", ["mlflow", "torchserve", "tensorflow"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: {"predictions": answer["predictions"][:-1]},
        lambda answer: {"predictions": [*answer["predictions"], answer["predictions"][0]]},
        lambda answer: {"predictions": []},
        lambda answer: {"predictions": "fine"},
        lambda answer: {},
        lambda answer: {"predictions": [[1], [1, 2], *answer["predictions"][2:]]},
        lambda answer: {"predictions": [{"a": 1}, {"b": 1}, *[{"a": 1}] * (len(answer["predictions"]) - 2)]},
    ],
)
def test_the_same_of_plain_json(protocol: str, spoil: Callable[[Any], Any]) -> None:
    with serving(protocol=protocol, model=lambda rows: {"total": rows.sum(axis=1)}) as fake:
        straight: Callable[[Any], Any] = lambda answer: {"predictions": _totals(answer["predictions"])}  # noqa: E731
        fake.spoil = straight
        with open_remote(PIN, fake.endpoint()) as engine:
            fake.spoil = lambda answer: spoil(straight(answer))
            with pytest.raises(RowMismatchError):
                engine.predict(ROWS, 30)


def _totals(predictions: Any) -> list[float]:
    return predictions["total"] if isinstance(predictions, dict) else [line["total"] for line in predictions]


def test_names_in_another_order_are_found_by_name() -> None:
    def turned(answer: dict[str, Any]) -> dict[str, Any]:
        return answer | {"outputs": answer["outputs"][::-1]}

    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        expected = engine.predict(ROWS, 30)
        fake.spoil = turned
        assert engine.predict(ROWS, 30).equals(expected)


def test_what_is_no_number_is_a_row_error() -> None:
    """Python servers write NaN and Infinity, which JSON does not have; others write null."""

    def holes(rows: Rows) -> dict[str, Rows]:
        found = high_or_low(rows)
        found["probabilities"][:, 1] = np.where(
            rows[:, 0] > 2, [np.nan, np.inf][len(rows) % 2], found["probabilities"][:, 1]
        )
        return found

    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.model = holes
        rows = with_x(ROWS, {5: 3.0, 119: 4.0})
        for batch_size in (30, 29):
            found = engine.predict(rows, batch_size)["error"].to_pylist()
            expected = [i for i, x in enumerate(rows["x"].to_pylist()) if x > 2]
            assert [i for i, error in enumerate(found) if error] == expected
            assert found[5].startswith("model_output: ")


@pytest.mark.parametrize("label", [[None], ["high", None]])
def test_a_row_without_a_label_is_a_row_error(label: list[Any]) -> None:
    whole = label == [None]

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        count = len(answer["predictions"]["total"])
        return {
            "predictions": [1 if whole else "high"] * (count - 1) + ([1 if whole else "low"] if count < 3 else [None])
        }

    def total(rows: Rows) -> dict[str, Rows]:
        return {"total": rows.sum(axis=1)}

    with (
        serving(protocol="mlflow", model=total, spoil=spoil) as fake,
        open_remote(PIN, fake.endpoint()) as engine,
    ):
        predicted = engine.predict(ROWS, 60).to_pylist()
        nothing = engine.predict(ROWS.slice(0, 0), 60)
    assert nothing.schema.field("prediction").type == ("int64" if whole else "string")
    assert [i for i, line in enumerate(predicted) if line["error"]] == [59, 119]
    assert predicted[59]["error"] == "model_output: the model returned no label"
    assert predicted[0]["prediction"] == (1 if whole else "high")


def test_a_row_that_breaks_the_model_is_found_while_the_server_is_well() -> None:
    """Many servers answer 500 when the model's own code fails on a row (MLServer and Triton do)."""

    def fragile(rows: Rows) -> dict[str, Rows]:
        if (rows[:, 0] < -900).any():
            raise Refused(500, "Traceback (most recent call last):\n  File ...\nZeroDivisionError: division by zero")
        return high_or_low(rows)

    with serving(model=fragile) as fake, open_remote(PIN, fake.endpoint()) as engine:
        predicted = engine.predict(with_x(ROWS, {9: -999.0, 60: -999.0}), 30)["error"].to_pylist()
    assert {i: error for i, error in enumerate(predicted) if error} == dict.fromkeys(
        (9, 60), "refused: 500: ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize("status", [400, 500])
def test_a_server_that_breaks_is_not_taken_for_bad_rows(status: int) -> None:
    def broken(rows: Rows) -> dict[str, Rows]:
        raise Refused(status, "CUDA error: device-side assert triggered")

    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.model = broken
        with pytest.raises(EngineUnavailableError, match="also those that it predicted at the start"):
            engine.predict(ROWS, 30)
        assert len(fake.seen) < 3 + 2 * 8 + 1, "rows were tried one by one"


def test_torchserve_says_later_when_its_handler_fails() -> None:
    def fragile(rows: Rows) -> dict[str, Rows]:
        if (rows[:, 0] < -900).any():
            raise Refused(503, "Prediction failed")
        return high_or_low(rows)

    with serving(protocol="torchserve", model=fragile) as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.script.append(busy)
        predicted = engine.predict(with_x(ROWS, {9: -999.0}), 30)["error"].to_pylist()
    assert [i for i, error in enumerate(predicted) if error] == [9]


def test_all_rows_refused_while_the_server_is_well() -> None:
    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        predicted = engine.predict(with_x(ROWS, dict.fromkeys(range(120), 1e5)), 30)
    assert predicted["error"].null_count == 0
    assert predicted["prediction"].null_count == 120


@pytest.mark.parametrize("protocol", ["oip", "torchserve", "tensorflow"])
def test_a_server_of_another_version_is_refused(protocol: str) -> None:
    with serving(protocol=protocol, version="2") as fake, pytest.raises(ModelPinError, match="version 3"):
        open_remote(PIN, fake.endpoint())


@pytest.mark.parametrize("protocol", ["oip", "torchserve", "tensorflow"])
def test_a_model_that_is_not_there(protocol: str) -> None:
    with serving(protocol=protocol) as fake, pytest.raises(ModelPinError, match="nobody|no model"):
        open_remote(PIN, fake.endpoint(model="nobody"))


def test_a_server_that_takes_up_another_version_in_the_middle() -> None:
    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.spoil = lambda answer: answer | {"model_version": "4"}
        with pytest.raises(ModelPinError, match="version 3 of model sums is pinned, the model server serves version 4"):
            engine.predict(ROWS, 30)
        fake.version = "4"
        with pytest.raises(ModelPinError, match="does not serve version 3"):
            engine.predict(ROWS, 30)


def test_whether_the_pin_was_proved_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def said(**facts: Any) -> str:
        caplog.clear()
        endpoint = facts.pop("endpoint", {})
        with serving(**facts) as fake, open_remote(PIN, fake.endpoint(**endpoint)):
            return f"{caplog.records[-1].levelname}: {caplog.messages[-1]}"

    assert "INFO" in said() and "its metadata lists version 3" in said()
    assert "its address names version 3" in said(protocol="torchserve")
    assert "version 3 is AVAILABLE" in said(protocol="tensorflow")
    assert "WARNING" in said(protocol="mlflow") and "does not tell what it serves" in said(protocol="mlflow")
    # a server that knows no versions, silent or telling only in its answers
    assert "does not tell" in said(version="")
    assert "its answers name version 3" in said(version="", spoil=lambda answer: answer | {"model_version": "3"})
    # another number there: the author's word
    assert "a version of its own" in said(version="1", endpoint={"version": "1"})


def test_a_server_without_versions_whose_answers_name_another() -> None:
    with (
        serving(version="", spoil=lambda answer: answer | {"model_version": "9"}) as fake,
        pytest.raises(ModelPinError, match="serves version 9"),
    ):
        open_remote(PIN, fake.endpoint())


def test_answers_to_other_requests_are_noticed() -> None:
    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.spoil = lambda answer: answer | {"id": "1"}
        with pytest.raises(RowMismatchError, match="mixed up"):
            engine.predict(ROWS, 30)


@pytest.mark.parametrize(
    ("status", "headers", "error", "says"),
    [
        (401, {}, ConnectionConfigError, "refuses this login"),
        (403, {}, ConnectionConfigError, "refuses this login"),
        (302, {"Location": "https://login/"}, ConnectionConfigError, "https://login/"),
        (405, {}, ConnectionConfigError, "does not take questions"),
        (404, {}, ModelPinError, "does not serve version 3"),
        (200, {}, RowMismatchError, "a page of HTML"),
    ],
)
def test_what_is_about_no_row(status: int, headers: dict[str, str], error: type[AiProviderError], says: str) -> None:
    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.script.extend([lambda handler: handler.answer(status, b"<html>t0ken</html>", headers)] * 20)
        with pytest.raises(error, match=says):
            engine.predict(ROWS, 30)


def test_a_server_of_another_protocol() -> None:
    with serving(protocol="mlflow") as fake, pytest.raises(ModelPinError, match="no model 'sums'"):
        open_remote(PIN, RemoteEndpoint("oip", f"http://127.0.0.1:{fake.port}"))


def test_a_header_cannot_carry_another() -> None:
    with pytest.raises(ConnectionConfigError, match="line break"):
        open_remote(PIN, RemoteEndpoint("oip", "http://127.0.0.1:1"), {"X": "a\r\nY: b"})


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow_ai_provider.core.infer.remote import client as remote

    monkeypatch.setattr(remote, "_ANSWER_LIMIT", 1 << 20)
    endless = json.dumps({"outputs": [], "pad": "x" * (2 << 20)}).encode()
    with serving() as fake, open_remote(PIN, fake.endpoint()) as engine:
        fake.script.append(lambda handler: handler.answer(200, endless))
        with pytest.raises(RowMismatchError, match="larger than 1 MiB"):
            engine.predict(ROWS, 120)
