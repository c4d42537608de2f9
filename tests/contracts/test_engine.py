"""What every engine promises, over arithmetic, ONNX Runtime, torch, mlflow's own loader and a model server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.infer.engine import Engine, open_engine
from airflow_ai_provider.core.infer.remote.client import open_remote
from airflow_ai_provider.errors import SignatureError
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer import model_server, models

COLUMNS = {
    ROW_ID: pa.string(),
    "score": pa.float64(),
    "probabilities": pa.list_(pa.float32()),
    "error": pa.string(),
}


@dataclass
class Case:
    """An engine, rows that it takes, and the same rows with some that it cannot take."""

    engine: Engine
    rows: pa.Table
    broken: pa.Table
    broken_at: list[int]
    spoilt_column: str
    stack: ExitStack = field(default_factory=ExitStack)


def arithmetic() -> Case:
    random = np.random.default_rng(1)
    rows = pa.table({ROW_ID: [f"r{i}" for i in range(500)], "x": random.normal(size=500), "y": random.normal(size=500)})
    broken = rows.set_column(1, "x", pa.array([None, float("nan"), *rows["x"].to_pylist()[2:]]))
    return Case(ArithmeticEngine(["x", "y"]), rows, broken, [0, 1], "y")


def onnx() -> Case:
    rows = models.cancer_rows()
    values = rows["mean_area"].to_pylist()
    values[3], values[7], values[568] = None, float("nan"), 1e300
    broken = rows.set_column(rows.column_names.index("mean_area"), "mean_area", pa.array(values))
    return Case(open_engine(*models.cancer_onnx(), "cpu"), rows, broken, [3, 7, 568], "worst_radius")


def torch() -> Case:
    rows = models.digit_rows()
    images = rows["bytes"].to_pylist()
    images[0], images[5], images[299] = None, b"no image", models.png(np.zeros((9, 9)))
    broken = rows.set_column(2, "bytes", pa.array(images))
    return Case(open_engine(*models.digit_torch(), "cpu"), rows, broken, [0, 5, 299], "bytes")


def pyfunc() -> Case:
    case = onnx()
    values = case.broken["mean_area"].to_pylist()
    values[568] = float("inf")  # float64 holds what float32 does not
    broken = case.broken.set_column(case.broken.column_names.index("mean_area"), "mean_area", pa.array(values))
    return replace(case, engine=open_engine(*models.cancer_pickle(), "cpu"), broken=broken)


def remote() -> Case:
    stack = ExitStack()
    fake = stack.enter_context(model_server.serving())
    rows = model_server.rows_of(500)
    broken = model_server.with_x(rows, {0: None, 1: float("nan"), 499: 5000.0})
    endpoint = fake.endpoint(timeout_s=10)
    return Case(open_remote(model_server.PIN, endpoint), rows, broken, [0, 1, 499], "y", stack)


@pytest.fixture(params=[arithmetic, onnx, torch, pyfunc, remote], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    make: Callable[[], Case] = request.param
    made = make()
    with made.stack, made.engine:
        yield made


def test_rows_come_back_in_their_order(case: Case) -> None:
    shuffled = case.rows.take(np.random.default_rng(2).permutation(case.rows.num_rows))
    for rows in (case.rows, shuffled):
        predicted = case.engine.predict(rows, 64)
        assert predicted.column_names == [ROW_ID, "prediction", "score", "probabilities", "error"]
        assert predicted[ROW_ID].equals(rows[ROW_ID])
        assert {name: predicted.schema.field(name).type for name in COLUMNS} == COLUMNS
        assert predicted["error"].null_count == rows.num_rows


def test_the_order_of_rows_changes_no_prediction(case: Case) -> None:
    backwards = case.rows.take(np.arange(case.rows.num_rows)[::-1])
    straight = case.engine.predict(case.rows, 64).to_pylist()
    for line, again in zip(straight, case.engine.predict(backwards, 64).to_pylist()[::-1], strict=True):
        assert (line[ROW_ID], line["prediction"]) == (again[ROW_ID], again["prediction"])
        assert line["score"] == pytest.approx(again["score"], abs=1e-6)


def test_the_score_is_the_probability_of_the_predicted_class(case: Case) -> None:
    predicted = case.engine.predict(case.rows, 64).to_pylist()
    for line in predicted:
        assert line["score"] == pytest.approx(max(line["probabilities"]), abs=1e-6)
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert len({line["prediction"] for line in predicted}) > 1, "a model that always says the same shows nothing"


def test_a_row_that_does_not_fit_fails_alone_and_says_why(case: Case) -> None:
    good = case.engine.predict(case.rows, 64).to_pylist()
    predicted = case.engine.predict(case.broken, 64).to_pylist()
    assert [i for i, line in enumerate(predicted) if line["error"]] == case.broken_at
    for i in case.broken_at:
        assert predicted[i]["prediction"] is predicted[i]["score"] is predicted[i]["probabilities"] is None
        assert ": " in predicted[i]["error"]
    assert [x for i, x in enumerate(predicted) if i not in case.broken_at] == [
        x for i, x in enumerate(good) if i not in case.broken_at
    ]


def test_the_same_reasons_at_every_run(case: Case) -> None:
    assert case.engine.predict(case.broken, 64).equals(case.engine.predict(case.broken, 64))


def test_no_rows_give_no_lines_of_the_same_types(case: Case) -> None:
    nothing = case.engine.predict(case.rows.slice(0, 0), 64)
    assert nothing.num_rows == 0
    assert nothing.schema == case.engine.predict(case.rows, 64).schema


def test_bits_depend_on_the_batch_size_only_where_the_engine_says_so(case: Case) -> None:
    expected = case.engine.predict(case.rows, 64)
    for cut in (64, 128, 256):  # the same calls of the model, spread over other calls of the engine
        parts = [case.engine.predict(case.rows.slice(i, cut), 64) for i in range(0, case.rows.num_rows, cut)]
        assert pa.concat_tables(parts).to_pylist() == expected.to_pylist()
    if case.engine.steady:
        for batch_size in (1, 2, 7, 100, 10_000):
            assert case.engine.predict(case.rows, batch_size).to_pylist() == expected.to_pylist()


def test_calls_may_run_at_once(case: Case) -> None:
    expected = case.engine.predict(case.rows, 64)
    with ThreadPoolExecutor(4) as pool:
        for predicted in pool.map(lambda _: case.engine.predict(case.rows, 64), range(8)):
            assert predicted.equals(expected)
        assert case.engine.predict(case.rows, 64, pool.map).equals(expected), "who makes the model's calls is seen"


def test_missing_columns_are_named_before_the_first_row(case: Case) -> None:
    assert set(case.engine.needs(case.rows.schema)) <= set(case.rows.column_names)
    with pytest.raises(SignatureError, match=case.spoilt_column):
        case.engine.needs(case.rows.drop_columns([case.spoilt_column]).schema)


def test_it_says_what_it_is(case: Case) -> None:
    assert case.engine.device in ("cpu", "cuda", "remote")
    assert case.engine.workers >= 1 and case.engine.batch_size >= 1 and case.engine.row_bytes >= 1
