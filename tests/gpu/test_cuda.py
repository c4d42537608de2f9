"""Engines on a real GPU, with nothing but the core: near the processor's answers, and the same bits at every run."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.engine import model_file, open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.onnx import OnnxEngine
from airflow_ai_provider.core.infer.tuning import Tuning
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import DeviceError
from tests.core.infer.batches import land, part_files
from tests.core.infer.dense import columns_signature, dense_onnx, fresh_folder, pin_folder, tensor_signature
from tests.core.infer.nets import sequence_pin, sequence_rows

pytestmark = pytest.mark.gpu
NAMES = [f"x{i}" for i in range(12)]
Made = tuple[Pin, Path, bool]


@functools.cache
def by_onnx() -> Made:
    folder = fresh_folder("dense")
    (folder / "model.onnx").write_bytes(dense_onnx([12, 256, 256, 3]))
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return pin_folder(folder, "onnx", columns_signature(NAMES), classes=["a", "b", "c"]), folder, has_cuda


@functools.cache
def by_torch() -> Made:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 256), torch.nn.ReLU(), torch.nn.Linear(256, 3)).eval()
    folder = fresh_folder("graph")
    (folder / "data").mkdir()
    rows = torch.export.Dim("rows", min=2)
    torch.export.save(
        torch.export.export(net, (torch.zeros(4, 12),), dynamic_shapes=({0: rows},)), folder / "data" / "model.pt2"
    )
    pin = pin_folder(folder, "torch", tensor_signature(12), classes=["a", "b", "c"], features=NAMES)
    return pin, folder, torch.cuda.is_available()


def rows(count: int) -> pa.Table:
    values = np.random.default_rng(5).standard_normal((12, count)).astype(np.float32)
    return pa.table({ROW_ID: [f"r{i}" for i in range(count)], **dict(zip(NAMES, values, strict=True))})


@pytest.fixture(params=[by_onnx, by_torch], ids=["onnx", "torch"])
def made(request: pytest.FixtureRequest) -> Made:
    make: Callable[[], Made] = request.param
    return make()


def test_a_gpu_is_taken_when_the_engine_has_one_and_required_only_then(made: Made) -> None:
    pin, folder, has_cuda = made
    with open_engine(pin, folder, "auto") as engine:
        assert engine.device == ("cuda" if has_cuda else "cpu")
    if has_cuda:
        with open_engine(pin, folder, "require_cuda") as engine:
            assert engine.device == "cuda"
    else:  # a processor's wheel on a machine with a GPU is refused as well
        with pytest.raises(DeviceError):
            open_engine(pin, folder, "require_cuda")
    with open_engine(pin, folder, "cpu") as engine:
        assert engine.device == "cpu"


def test_the_gpu_says_what_the_processor_says(made: Made) -> None:
    pin, folder, _ = made
    table = rows(5000)
    with open_engine(pin, folder, "auto") as engine, open_engine(pin, folder, "cpu") as reference:
        found, expected = engine.predict(table, 1024), reference.predict(table, 1024)
    assert found[ROW_ID].equals(table[ROW_ID])
    assert np.abs(found["score"].to_numpy() - expected["score"].to_numpy()).max() < 1e-4
    agree = np.array(found["prediction"].to_pylist()) == np.array(expected["prediction"].to_pylist())
    assert agree.mean() > 0.999


def test_a_batch_has_the_same_bytes_at_every_run_and_its_device_in_its_name(made: Made, tmp_path: Path) -> None:
    pin, folder, has_cuda = made
    refs, files = {}, {}
    for run, device in enumerate(["auto", "auto", "cpu"]):
        store = Store(str(tmp_path / str(run)))
        with open_engine(pin, folder, device) as engine:
            refs[run] = infer(land(store, [rows(5000), rows(7)]), pin, store, engine, pipeline="p", batch_size=1024)
        files[run] = part_files(store, refs[run])
    assert files[0] == files[1] and refs[0].batch_id == refs[1].batch_id
    assert (refs[0].batch_id != refs[2].batch_id) == has_cuda


def test_a_size_is_found_once_and_every_try_goes_by_it(made: Made, tmp_path: Path) -> None:
    """No size is given: it is settled before the first row where bits depend on it, and kept by resumes."""
    pin, folder, _ = made
    store = Store(str(tmp_path / "store"))
    batch = land(store, [rows(40_000), rows(40_000)])
    with open_engine(pin, folder, "auto") as engine:
        first = infer(batch, pin, store, engine, pipeline="p")
        files = part_files(store, first)
        for mark in Path(first.uri).rglob("00001.parquet*"):
            mark.unlink()
        again = infer(batch, pin, store, engine, pipeline="p")
    assert again == first and part_files(store, again) == files
    facts = store.manifest(first).facts["engine"]
    assert ("batch_size" in facts) == (not engine.steady)


def test_lists_of_any_length_say_on_a_gpu_what_they_say_on_a_processor() -> None:
    pin, folder = sequence_pin(hidden=64, vocabulary=100, longest=128, token_types=True)
    table = sequence_rows(500, vocabulary=100, longest=128, median=20)
    with open_engine(pin, folder, "auto") as engine, open_engine(pin, folder, "cpu") as reference:
        found, expected = engine.predict(table, 4096), reference.predict(table, 1024)
        assert found.equals(engine.predict(table, 4096))
        backwards = engine.predict(table.take(np.arange(500)[::-1]), 4096)
    assert backwards.to_pylist()[::-1] == found.to_pylist()
    assert np.abs(found["score"].to_numpy() - expected["score"].to_numpy()).max() < 1e-3


def test_calls_at_once_give_the_bits_of_one_after_the_other(made: Made) -> None:
    """Copies of one thread's rows overlap with another's call."""
    pin, folder, _ = made
    tables = [rows(4096).slice(start, 1024) for start in range(0, 4096, 1024)] * 8
    with open_engine(pin, folder, "auto") as engine:
        engine.warm_up(512)
        expected = [engine.predict(table, 512) for table in tables]
        with ThreadPoolExecutor(engine.workers) as pool:
            found = list(pool.map(lambda table: engine.predict(table, 512), tables))
    assert all(one.equals(two) for one, two in zip(found, expected, strict=True))


def test_bound_buffers_change_no_bit() -> None:
    pin, folder, _ = by_onnx()
    with (
        OnnxEngine(pin, model_file(pin, folder), "auto", bound=True) as bound,
        OnnxEngine(pin, model_file(pin, folder), "auto", bound=False) as plain,
    ):
        for count in (1, 700, 2000):
            assert bound.predict(rows(count), 512).equals(plain.predict(rows(count), 512))


@pytest.mark.parametrize("tuning", [Tuning("bfloat16"), Tuning("float16"), Tuning(compile=True)], ids=str)
def test_a_tuned_torch_model_is_near_the_plain_one_and_the_same_at_every_run(tuning: Tuning) -> None:
    pin, folder, _ = by_torch()
    if tuning.compile and torch.cuda.is_available() and shutil.which("gcc") is None:
        with open_engine(pin, folder, "auto", tuning) as engine, pytest.raises(DeviceError, match="cannot compile"):
            engine.warm_up(512)
        return
    with open_engine(pin, folder, "auto") as plain, open_engine(pin, folder, "auto", tuning) as tuned:
        tuned.warm_up(512)
        expected, found = plain.predict(rows(3000), 512), tuned.predict(rows(3000), 512)
        assert found.equals(tuned.predict(rows(3000), 512))
    assert np.abs(found["score"].to_numpy() - expected["score"].to_numpy()).max() < 0.05


def test_tensorrt_is_proved_or_refused_and_a_kept_build_has_the_same_bits(tmp_path: Path) -> None:
    pin, folder, _ = by_onnx()
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(DeviceError, match="TensorRT"):
            open_engine(pin, folder, "auto", Tuning(compile=True))
        return
    try:
        engine = open_engine(pin, folder, "auto", Tuning(compile=True), tmp_path)
    except DeviceError as error:  # onnxruntime-gpu offers the provider also where TensorRT's libraries are missing
        assert "TensorRT" in str(error)
        return
    with engine, open_engine(pin, folder, "cpu") as reference:
        engine.warm_up(512)
        found, expected = engine.predict(rows(2000), 512), reference.predict(rows(2000), 512)
    with open_engine(pin, folder, "auto", Tuning(compile=True), tmp_path) as again:
        assert again.predict(rows(2000), 512).equals(found)
    assert np.abs(found["score"].to_numpy() - expected["score"].to_numpy()).max() < 1e-3


def test_an_unknown_token_is_found_before_the_gpu_sees_it() -> None:
    pin, folder = sequence_pin(hidden=64, vocabulary=100, longest=128)
    named = Pin(**{**pin.to_dict(), "metadata": {**pin.metadata, "sequence": {"longest": 128, "vocabulary": 100}}})
    table = sequence_rows(50, vocabulary=100, longest=128, median=20)
    lists = table["input_ids"].to_pylist()
    lists[7] = [1, 100]
    broken = table.set_column(1, "input_ids", pa.array(lists, pa.list_(pa.int64())))
    with open_engine(named, folder, "auto") as engine:
        good, found = engine.predict(table, 4096).to_pylist(), engine.predict(broken, 4096).to_pylist()
    assert [line for i, line in enumerate(found) if i != 7] == [line for i, line in enumerate(good) if i != 7]
    assert found[7]["error"].startswith("misfit: input_ids holds 100")
