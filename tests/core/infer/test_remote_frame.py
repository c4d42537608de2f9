"""Rows as columns of their own types, and how each protocol writes them."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ROW_ID, Pin, digest_of
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.core.infer.remote.frame import Frame
from airflow_ai_provider.core.infer.remote.rest import MlflowWire, TorchServeWire
from airflow_ai_provider.core.infer.remote.wire import Reply, column_output
from airflow_ai_provider.errors import RowMismatchError, SignatureError

FILES = {"model.onnx": "sha256:" + "1" * 64}


def pin_of(**columns: str) -> Pin:
    """Name → type; a type with a question mark is optional."""
    inputs = [{"type": t.rstrip("?"), "name": n, "required": not t.endswith("?")} for n, t in columns.items()]
    return Pin("m", "1", "", digest_of(FILES), FILES, "onnx", {"inputs": inputs, "outputs": []})


def sent(pin: Pin, rows: pa.Table) -> tuple[dict[str, Any], dict[int, str]]:
    """What ``mlflow models serve`` would get, and the rows' errors."""
    wire = MlflowWire(pin, RemoteEndpoint("mlflow", "http://h"))
    inputs = wire.features().read(rows)
    return json.loads(wire.encode(inputs.arrays).body)["dataframe_split"], inputs.errors


def test_values_keep_their_type_and_precision() -> None:
    pin = pin_of(f="float", d="double", i="integer", n="long", b="boolean", s="string", t="datetime", x="binary")
    rows = pa.table(
        {
            ROW_ID: ["r"],
            "f": pa.array([17.99], pa.float32()),
            "d": [0.1],
            "i": pa.array([7.0]),
            "n": [2**53 + 1],
            "b": [True],
            "s": ['"ü\n'],
            "t": [datetime(2026, 1, 2, 3, 4, 5)],
            "x": [b"\x00\xff"],
        }
    )
    frame, errors = sent(pin, rows)
    assert frame["columns"] == ["f", "d", "i", "n", "b", "s", "t", "x"]
    assert frame["data"] == [[pytest.approx(17.99), 0.1, 7, 2**53 + 1, True, '"ü\n', "2026-01-02T03:04:05", "AP8="]]
    assert isinstance(frame["data"][0][2], int)
    assert not errors


def test_rows_that_do_not_fit_fail_by_themselves() -> None:
    pin = pin_of(a="double", n="long", s="string", o="double?")
    rows = pa.table(
        {
            ROW_ID: list("abcdefg"),
            "a": [1.0, None, float("nan"), float("inf"), 1, 1, 1],
            "n": [1.0, 1, 1, 1, 1.5, 1, 1],
            "s": ["s", "s", "s", "s", "s", None, "s"],
            "o": [None, 1, 1, 1, 1, 1, float("inf")],
        }
    )
    frame, errors = sent(pin, rows)
    assert {row: error.partition(":")[0] for row, error in errors.items()} == {
        1: "null_value",
        2: "not_finite",
        3: "not_finite",
        4: "wrong_type",
        5: "null_value",
        6: "not_finite",
    }
    assert frame["data"][0] == [1.0, 1, "s", None], "a hole that the signature allows is sent as a hole"


def test_an_optional_column_may_be_absent() -> None:
    pin = pin_of(a="double", o="string?")
    rows = pa.table({ROW_ID: ["r"], "a": pa.array([Decimal("1.5")])})
    assert Frame(pin).needs(rows.schema) == ["a"]
    assert sent(pin, rows) == ({"columns": ["a"], "data": [[1.5]]}, {})


def test_columns_that_are_missing_or_no_numbers_are_named() -> None:
    with pytest.raises(SignatureError, match="no column b, a of type string instead of double"):
        Frame(pin_of(b="string", a="double")).needs(pa.schema({"a": pa.string()}))


def test_no_rows_and_rows_in_pieces() -> None:
    pin = pin_of(a="double", s="string")
    rows = pa.table({ROW_ID: ["r", "q"], "a": [1.0, 2.0], "s": ["x", "y"]})
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    assert sent(pin, pieces) == sent(pin, rows)
    assert len(Frame(pin).read(rows.slice(0, 0)).arrays[0]) == 0


def test_torchserve_gets_a_mapping_per_row_where_texts_are_among_them() -> None:
    wire = TorchServeWire(pin_of(text="string", size="double"), RemoteEndpoint("torchserve", "http://h"))
    rows = pa.table({ROW_ID: ["r", "q"], "text": ["a", "b"], "size": [1.0, 2.0]})
    asked = wire.encode(wire.features().read(rows).arrays)
    assert asked.path == "/predictions/m/1"
    assert json.loads(asked.body) == {"instances": [{"text": "a", "size": 1.0}, {"text": "b", "size": 2.0}]}
    single = TorchServeWire(pin_of(text="string"), RemoteEndpoint("torchserve", "http://h"))
    asked = single.encode(single.features().read(rows).arrays)
    assert json.loads(asked.body) == {"instances": [{"text": "a"}, {"text": "b"}]}
    assert wire.decode(Reply(200, b"[3, 4]"), asked, 2)["predictions"].tolist() == [3, 4]


def test_a_frame_without_names_is_one_output_of_scores() -> None:
    found = column_output([{"0": 0.1, "1": 0.9}, {"0": 0.7, "1": 0.3}], 2)
    assert found["predictions"].tolist() == [[0.1, 0.9], [0.7, 0.3]]
    assert list(column_output([{"label": "a", "score": 0.5}], 1)) == ["label", "score"]
    with pytest.raises(RowMismatchError):
        column_output([{"label": "a"}], 2)
