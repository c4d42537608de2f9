"""The cache of model files: proved at each fetch, whole or not there, shared by processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer import cache
from airflow_ai_provider.errors import ModelPinError
from tests.core.infer import models


@pytest.fixture
def warm(tmp_path: Path) -> tuple[Pin, Path]:
    pin, folder = models.cancer_onnx()
    with cache.aside(tmp_path) as fresh:
        shutil.copytree(folder, fresh, dirs_exist_ok=True)
        cache.place(fresh, cache.folder_of(pin.digest, tmp_path), pin.files)
    return pin, tmp_path


@contextmanager
def no_registry() -> Iterator[str]:
    yield "sqlite:////nowhere/at/all.db"


def test_a_warm_cache_asks_no_registry(warm: tuple[Pin, Path]) -> None:
    pin, cache_dir = warm

    def registry() -> str:
        raise AssertionError("the registry was asked")

    folder = cache.fetch(pin, cache_dir, registry)
    assert cache.hash_files(folder) == pin.files
    assert [path.name for path in cache_dir.iterdir()] == [folder.name]


def test_predicting_with_a_pinned_cached_model_imports_neither_mlflow_nor_torch_nor_pandas(
    warm: tuple[Pin, Path], tmp_path: Path
) -> None:
    pin, cache_dir = warm
    pq.write_table(models.cancer_rows(), tmp_path / "rows.parquet")
    script = (
        "import json, sys\n"
        "from airflow_ai_provider.core.batch import Pin\n"
        "from airflow_ai_provider.core.infer.cache import fetch\n"
        "from airflow_ai_provider.core.infer.engine import open_engine\n"
        "pin = Pin.from_dict(json.loads(sys.argv[1]))\n"
        "import pyarrow.parquet as pq\n"
        "rows = pq.ParquetFile(sys.argv[3]).read()\n"
        "with open_engine(pin, fetch(pin, sys.argv[2]), 'cpu') as engine:\n"
        "    assert engine.predict(rows, 100)['error'].null_count == rows.num_rows\n"
        "print(*sorted({'mlflow', 'torch', 'airflow', 'pandas', 'sqlalchemy', 'yaml', 'PIL'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, json.dumps(pin.to_dict()), str(cache_dir), str(tmp_path / "rows.parquet")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == ""


@pytest.mark.parametrize("harm", ["change", "delete", "add"])
def test_changed_bytes_in_the_cache_are_not_opened(warm: tuple[Pin, Path], harm: str) -> None:
    pin, cache_dir = warm
    folder = cache.folder_of(pin.digest, cache_dir)
    if harm == "change":
        (folder / "model.onnx").write_bytes(b"other")
    elif harm == "delete":
        (folder / "model.onnx").unlink()
    else:
        (folder / "custom_ops.so").write_bytes(b"\x7fELF")
    with no_registry() as uri, pytest.raises(Exception, match="no such file"):
        cache.fetch(pin, cache_dir, uri)  # it must ask the registry again, which is not there


def test_a_pin_that_was_changed_on_its_way_is_refused(warm: tuple[Pin, Path]) -> None:
    pin, cache_dir = warm
    forged = replace(pin, files={**pin.files, "model.onnx": "sha256:" + "0" * 64})
    with pytest.raises(ModelPinError, match="changed on its way"):
        cache.fetch(forged, cache_dir)


def test_who_comes_second_keeps_what_the_first_placed(warm: tuple[Pin, Path]) -> None:
    pin, cache_dir = warm
    folder = cache.folder_of(pin.digest, cache_dir)
    before = (folder / "model.onnx").stat().st_ino
    with cache.aside(cache_dir) as fresh:
        shutil.copytree(models.cancer_onnx()[1], fresh, dirs_exist_ok=True)
        cache.place(fresh, folder, pin.files)
    assert (folder / "model.onnx").stat().st_ino == before
    assert [path.name for path in cache_dir.iterdir()] == [folder.name]


def test_a_wrong_folder_in_the_place_is_replaced(warm: tuple[Pin, Path]) -> None:
    pin, cache_dir = warm
    folder = cache.folder_of(pin.digest, cache_dir)
    (folder / "model.onnx").write_bytes(b"other")
    with cache.aside(cache_dir) as fresh:
        shutil.copytree(models.cancer_onnx()[1], fresh, dirs_exist_ok=True)
        cache.place(fresh, folder, pin.files)
    assert cache.differences(folder, pin.files) == []


def test_differences_are_named(warm: tuple[Pin, Path]) -> None:
    pin, cache_dir = warm
    folder = cache.folder_of(pin.digest, cache_dir)
    files = {**pin.files, "sub/absent.bin": "sha256:" + "0" * 64}
    (folder / "model.onnx").write_bytes(b"other")
    (folder / "more.txt").write_bytes(b"")
    assert cache.differences(folder, files) == [
        "sub/absent.bin is missing",
        "more.txt was not pinned",
        "model.onnx has other bytes",
    ]
