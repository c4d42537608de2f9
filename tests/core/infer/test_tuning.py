"""Models made faster at the price of other last bits: done or refused, in the batch's name, the same at every run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.infer.runner import Runner
from airflow_ai_provider.core.infer.tuning import AS_IT_IS, Tuning
from airflow_ai_provider.core.infer.worker import WarmEngines, Worker
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import DeviceError, SpecError
from tests.core.infer import models
from tests.core.infer.batches import land, part_files

NAMES = [f"x{i}" for i in range(12)]
HALF = Tuning(precision="bfloat16")
COMPILED = Tuning(compile=True)
Made = tuple[Pin, Path]


@pytest.fixture(scope="module")
def dense() -> Made:
    """A net over columns whose probabilities are logits still, so that half the digits show."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3), torch.nn.Softmax(1))
    folder = models.fresh_folder("tuned")
    shapes = ({0: torch.export.Dim("rows", min=2)},)
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(4, 12),), dynamic_shapes=shapes), folder / "m.pt2")
    pin = models.pin_folder(folder, "torch", models.tensor_signature(12), classes=["a", "b", "c"], features=NAMES)
    return pin, folder


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("builds")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield folder


def rows(count: int) -> pa.Table:
    values = np.random.default_rng(5).standard_normal((12, count)).astype(np.float32)
    return pa.table({ROW_ID: [f"r{i}" for i in range(count)], **dict(zip(NAMES, values, strict=True))})


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_the_digits_are_near_the_models_own_and_the_same_at_every_run(dense: Made, precision: str) -> None:
    with open_engine(*dense, "cpu") as exact, open_engine(*dense, "cpu", Tuning(precision)) as half:
        assert (dict(exact.traits), dict(half.traits)) == ({}, {"precision": precision})
        one, two = exact.predict(rows(300), 64), half.predict(rows(300), 64)
        assert two.equals(half.predict(rows(300), 64))
    scores, near = one["score"].to_numpy(), two["score"].to_numpy()
    assert 0 < np.abs(scores - near).max() < 0.02, "half the digits must show, and not be wrong"
    assert two.schema == one.schema and two["error"].null_count == 300


def test_a_compiled_model_says_what_it_says_uncompiled(dense: Made, builds: Path) -> None:
    with open_engine(*dense, "cpu") as plain, open_engine(*dense, "cpu", COMPILED) as compiled:
        assert dict(compiled.traits) == {"compiler": "inductor"} and not compiled.tunable
        compiled.warm_up(64)
        assert any(builds.rglob("*.so")), "nothing was compiled"
        one, two = plain.predict(rows(300), 64), compiled.predict(rows(300), 64)
        assert two.equals(compiled.predict(rows(300), 64))
        backwards = compiled.predict(rows(300).take(np.arange(300)[::-1]), 64)
    assert backwards.take(np.arange(300)[::-1]).to_pylist() == two.to_pylist()
    assert np.allclose(one["score"].to_numpy(), two["score"].to_numpy(), atol=1e-5)
    assert one["prediction"].to_pylist() == two["prediction"].to_pylist()


def test_a_batch_is_named_by_its_tuning_and_takes_no_part_of_another(dense: Made, tmp_path: Path) -> None:
    store, kinds = Store(str(tmp_path)), {"exact": AS_IT_IS, "half": HALF, "float16": Tuning("float16")}
    batch = land(store, [rows(200), rows(100)])
    refs = {}
    for name, tuning in kinds.items():
        with open_engine(*dense, "cpu", tuning) as engine:
            refs[name] = infer(batch, dense[0], store, engine, pipeline="p", batch_size=64)
    assert len({ref.batch_id for ref in refs.values()}) == 3
    assert store.manifest(refs["half"]).facts["engine"]["precision"] == "bfloat16"
    assert "precision" not in store.manifest(refs["exact"]).facts["engine"]
    # even under the other's name, a finished part is not taken
    exact, half = (Path(refs[name].uri) for name in ("exact", "half"))
    before = part_files(store, refs["exact"])
    for file in exact.rglob("00000.parquet*"):
        shutil.copy(half / file.relative_to(exact), file)
    with open_engine(*dense, "cpu") as engine:
        again = infer(batch, dense[0], store, engine, pipeline="p", batch_size=64)
    assert part_files(store, again) == before


def test_what_a_model_cannot_have_is_refused_before_it_is_loaded(dense: Made) -> None:
    onnx, pickled = models.cancer_onnx(), models.cancer_pickle()
    for made, tuning, said in [
        (onnx, HALF, "precision cannot be had for this model"),
        (pickled, HALF, "precision cannot be had for this model: its own Python code"),
        (pickled, COMPILED, "compile cannot be had for this model: its own Python code"),
    ]:
        with pytest.raises(SpecError, match=said):
            open_engine(*made, "cpu", tuning)
    with pytest.raises(DeviceError, match="TensorRT"):
        open_engine(*onnx, "auto", COMPILED)


def test_a_torchscript_is_not_compiled(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(12, 3), torch.zeros(4, 12)), str(tmp_path / "data" / "model.pth"))
    pin = models.pin_folder(tmp_path, "torch", models.tensor_signature(12), features=NAMES)
    with pytest.raises(SpecError, match=r"only a graph of torch.export"):
        open_engine(pin, tmp_path, "cpu", COMPILED)


def test_each_models_programs_are_kept_where_it_is_told_unless_the_environment_says_where(
    dense: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for name, size in (("one", 32), ("two", 48)):  # what a process has loaded once, it does not compile again
        with open_engine(*dense, "cpu", COMPILED, tmp_path / name) as engine:
            engine.warm_up(size)
        assert any((tmp_path / name).rglob("*.so")), name
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "asked"))
    with open_engine(*dense, "cpu", COMPILED, tmp_path / "three") as engine:
        engine.warm_up(80)
    assert any((tmp_path / "asked").rglob("*.so")) and not (tmp_path / "three").exists()


def test_a_worker_without_a_compiler_is_told_so_and_no_row_is_blamed(
    dense: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "builds"))
    torch.compiler.reset()
    config: Any = __import__("torch._inductor.config").__dict__["_inductor"].config
    with (
        config.patch({"cpp.cxx": (None, str(tmp_path / "no-such-compiler")), "fx_graph_cache": False}),
        open_engine(*dense, "cpu", COMPILED) as engine,
    ):
        for call in (lambda: engine.warm_up(32), lambda: engine.predict(rows(40), 32)):
            with pytest.raises(DeviceError, match=r"torch cannot compile it here: .*C\+\+ compiler"):
                call()


def test_a_runner_carries_its_tuning_to_the_engine(dense: Made, tmp_path: Path) -> None:
    pin, folder = dense
    worker, warm = Worker(str(tmp_path)), WarmEngines()
    shutil.copytree(folder, tmp_path / pin.digest.removeprefix("sha256:"), dirs_exist_ok=True)
    runner = Runner.from_dict({"precision": "bfloat16", "compile": "False"})
    assert runner.tuning == HALF
    plain = warm.engine(worker, pin, "cpu")
    assert warm.engine(worker, pin, "cpu") is plain
    half = warm.engine(worker, pin, "cpu", tuning=runner.tuning)
    assert half is not plain and half.traits["precision"] == "bfloat16"
    assert warm.engine(worker, pin, "cpu", tuning=HALF) is half
    warm.close()
