"""How ONNX Runtime is reached: through bound buffers with the same bytes, and by TensorRT only when that is proved."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import pyarrow as pa
import pytest

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.engine import model_file
from airflow_ai_provider.core.infer.onnx import OnnxEngine
from airflow_ai_provider.core.infer.tuning import AS_IT_IS, Tuning
from airflow_ai_provider.errors import DeviceError, SpecError
from tests.core.infer import models
from tests.core.infer.dense import columns_signature, dense_onnx, fresh_folder, pin_folder
from tests.core.infer.nets import sequence_pin, sequence_rows

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
COMPILED = Tuning(compile=True)


def opened(pin: Pin, folder: Path, tuning: Tuning = AS_IT_IS, *, device: str = "cpu", **more: Any) -> OnnxEngine:
    return OnnxEngine(pin, model_file(pin, folder), device, tuning, **more)


def of_columns() -> tuple[Pin, Path, pa.Table]:
    return *models.cancer_onnx(), models.cancer_rows()


def of_one_size() -> tuple[Pin, Path, pa.Table]:
    folder, names = fresh_folder("fixed"), [f"x{i}" for i in range(4)]
    (folder / "model.onnx").write_bytes(dense_onnx([4, 16, 3], rows=8))
    rows = pa.table({ROW_ID: [f"r{i}" for i in range(45)], **{name: [i / 7 for i in range(45)] for name in names}})
    return pin_folder(folder, "onnx", columns_signature(names), classes=["a", "b", "c"]), folder, rows


def of_sequences() -> tuple[Pin, Path, pa.Table]:
    rows = sequence_rows(300, vocabulary=50, longest=64, median=12)
    return *sequence_pin(hidden=32, vocabulary=50, longest=64), rows


@pytest.mark.parametrize("made", [of_columns, of_one_size, of_sequences], ids=lambda made: made.__name__)
@pytest.mark.parametrize("size", [7, 256])
def test_bound_buffers_give_the_bytes_of_a_plain_call(made: Callable[[], Any], size: int) -> None:
    pin, folder, rows = made()
    with opened(pin, folder) as plain, opened(pin, folder, bound=True) as bound:
        expected = plain.predict(rows, size)
        for _ in range(2):  # the second time over buffers that hold the first one's rows
            assert bound.predict(rows, size).equals(expected)
        with ThreadPoolExecutor(3) as pool:  # buffers belong to a thread
            for found in pool.map(lambda _: bound.predict(rows, size), range(9)):
                assert found.equals(expected)


def test_a_row_that_is_refused_leaves_the_buffers_as_good_as_they_were() -> None:
    pin, folder, rows = of_sequences()
    lists = rows["input_ids"].to_pylist()
    lists[5] = [999]
    broken = rows.set_column(1, "input_ids", pa.array(lists, pa.list_(pa.int64())))
    with opened(pin, folder) as plain, opened(pin, folder, bound=True) as bound:
        one, two = plain.predict(broken, 256), bound.predict(broken, 256)
        assert two.drop_columns("error").equals(one.drop_columns("error"))
        assert [i for i, said in enumerate(two["error"].to_pylist()) if said] == [5]
        assert "idx=999" in two["error"][5].as_py()
        assert bound.predict(rows, 256).equals(plain.predict(rows, 256))


# --- TensorRT: a session on a processor that says what one on a GPU would say ---


class Session:
    """A real session on the processor, under the name of the providers that it was asked for."""

    def __init__(self, real: Any, providers: list[str]) -> None:
        self._real, self._providers = real, providers

    def get_providers(self) -> list[str]:
        return self._providers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with TensorRT, as far as a session tells; what sessions were opened with."""
    real, asked = onnxruntime.InferenceSession, list[Any]()

    def open_session(path: str, options: Any, providers: list[Any]) -> Any:
        names = [given if isinstance(given, str) else given[0] for given in providers]
        asked.append(providers)
        return Session(real(path, options, providers=[CPU]), names)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    return asked


def test_tensorrt_is_taken_only_when_asked_for(gpu: list[Any]) -> None:
    pin, folder, _ = of_columns()
    assert opened(pin, folder, device="auto", bound=False).device == "cuda"
    assert [given[0] for given in gpu.pop(0)[:1]] == [CUDA] and gpu == []


def test_tensorrt_keeps_its_builds_by_what_they_depend_on(gpu: list[Any], tmp_path: Path) -> None:
    pin, folder, rows = of_columns()
    caches = []
    for tuning in (COMPILED, COMPILED, Tuning("float16", compile=True)):
        engine = opened(pin, folder, tuning, device="require_cuda", builds=tmp_path, bound=False)
        (name, options), (second, _), last = gpu[-2]
        assert (name, second, last) == (TENSORRT, CUDA, CPU) and gpu[-1] == [CPU], "the sample needs no build"
        assert options["trt_fp16_enable"] == (tuning.precision == "float16") and options["trt_engine_cache_enable"]
        assert Path(options["trt_engine_cache_path"]).is_dir()
        caches.append(options["trt_engine_cache_path"])
        assert (engine.device, engine.tunable, engine.steady) == ("cuda", False, False)
        assert dict(engine.traits) == tuning.traits("tensorrt") and engine.traits["compiler"] == "tensorrt"
        engine.warm_up(64)
        assert engine.predict(rows, 64)["error"].null_count == rows.num_rows
    assert caches[0] == caches[1] != caches[2]


def test_a_session_that_fell_back_from_tensorrt_is_refused(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pin, folder, _ = of_columns()
    monkeypatch.setattr(Session, "get_providers", lambda self: [CUDA, CPU])
    with pytest.raises(DeviceError, match=f"means TensorRT, and the session runs on {CUDA}, {CPU}"):
        opened(pin, folder, COMPILED, device="auto")


def test_what_tensorrt_is_not_given(gpu: list[Any]) -> None:
    pin, folder, _ = of_columns()
    with pytest.raises(DeviceError, match="device is cpu"):
        opened(pin, folder, COMPILED)
    with pytest.raises(SpecError, match="TensorRT .compile. can make it float16"):
        opened(pin, folder, Tuning("bfloat16", compile=True), device="auto")
    pin, folder, _ = of_sequences()
    with pytest.raises(SpecError, match="lists of any length would be a build each"):
        opened(pin, folder, COMPILED, device="auto")
