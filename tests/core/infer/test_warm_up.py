"""The first call of a model, made before the clock starts; and one session for all of a task's parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.progress import Progress
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer import models
from tests.core.infer.batches import PIN, land, rows
from tests.core.infer.nets import sequence_pin, sequence_rows
from tests.core.infer.test_onnx_device import gpu, opened

__all__ = ["gpu"]


class Noted(ArithmeticEngine):
    """Note warm-ups among the calls; the memory holds so many rows."""

    steady = False

    def __init__(self, most: int = 10_000) -> None:
        super().__init__(["x", "y"], before=lambda rows: self.said.append("rows"))
        self.said: list[Any] = []
        self._most = most

    def warm_up(self, batch_size: int) -> None:
        if batch_size > self._most:
            raise MemoryError("full")
        self.said.append(batch_size)


def test_a_model_is_warmed_up_once_before_the_first_row_and_not_when_nothing_is_left(tmp_path: Path) -> None:
    store, engine = Store(str(tmp_path)), Noted()
    batch = land(store, [rows(100), rows(50, start=100)])
    infer(batch, PIN, store, engine, pipeline="p", batch_size=64)
    assert engine.said[0] == 64 and set(engine.said[1:]) == {"rows"}
    again = Noted()
    infer(batch, PIN, store, again, pipeline="p", batch_size=64)
    assert again.said == []


def test_a_warm_up_that_fills_the_memory_makes_calls_smaller(tmp_path: Path) -> None:
    store, engine = Store(str(tmp_path)), Noted(most=32)
    engine.steady = True
    ref = infer(land(store, [rows(100)]), PIN, store, engine, pipeline="p", batch_size=100)
    assert engine.said[0] == 25 and ref.counts["predicted"] == 100


def test_the_clock_starts_after_it() -> None:
    said: list[str] = []
    clock = iter([0.0, 60.0, 70.0])
    told = Progress(said.append, 100, now=lambda: next(clock))
    told.start()
    told.advance(50)
    assert said == ["50 of 100 rows (50%), 5 rows/s, about 10 s left"]


def test_a_gpu_is_warmed_up_with_the_shape_of_the_calls(gpu: list[Any]) -> None:
    with opened(*models.cancer_onnx(), device="auto", bound=False) as engine:
        shapes = spied(engine)
        engine.warm_up(64)
        engine.predict(models.cancer_rows(), 64)
    assert len(shapes) == 10 and len(set(shapes)) == 1
    with opened(*sequence_pin(hidden=32, vocabulary=50, longest=64), device="auto", bound=False) as engine:
        shapes = spied(engine)
        engine.warm_up(640)
        engine.predict(sequence_rows(200, vocabulary=50, longest=64, median=12), 640)
    assert shapes[0] in shapes[1:]


def spied(engine: Any) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    run: Callable[..., Any] = engine._run

    def noted(arrays: list[Any]) -> Any:
        shapes.append(arrays[0].shape)
        return run(arrays)

    engine._run = noted
    return shapes


@pytest.mark.parametrize(
    ("make", "module", "name"),
    [(models.cancer_onnx, onnxruntime, "InferenceSession"), (models.digit_torch, torch.export, "load")],
    ids=["onnx", "torch"],
)
def test_all_parts_of_a_task_go_through_one_session(
    make: Callable[[], Any], module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_sessions: list[str] = []
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda path, *a, **k: opened_sessions.append(path) or real(path, *a, **k))
    pin, folder = make()
    table = models.cancer_rows() if module is onnxruntime else models.digit_rows()
    store = Store(str(tmp_path))
    batch = land(store, [table.slice(start, 40) for start in range(0, 200, 40)])
    with open_engine(pin, folder, "cpu") as engine:
        ref = infer(batch, pin, store, engine, pipeline="p", batch_size=16)
    assert len(store.manifest(ref).table("predictions")) == 5 and len(opened_sessions) == 1
