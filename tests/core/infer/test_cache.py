"""The cache of model files: proved at each fetch, whole or not there, shared by processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from airflow_ai_provider.core.batch import Pin, digest_of
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


def test_who_comes_second_fills_the_place_when_the_first_is_removed_at_once(
    warm: tuple[Pin, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, cache_dir = warm
    folder, rename = cache.folder_of(pin.digest, cache_dir), os.rename

    def rename_late(source: Path, target: Path) -> None:
        monkeypatch.undo()
        try:
            rename(source, target)
        finally:
            cache.evict(cache_dir, 0)

    with cache.aside(cache_dir) as fresh:
        shutil.copytree(models.cancer_onnx()[1], fresh, dirs_exist_ok=True)
        monkeypatch.setattr(os, "rename", rename_late)
        cache.place(fresh, folder, pin.files)
    assert cache.hash_files(folder) == pin.files


def test_files_that_are_removed_while_they_are_read_are_none(
    warm: tuple[Pin, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, cache_dir = warm
    folder, opened = cache.folder_of(pin.digest, cache_dir), Path.open

    def open_late(path: Path, *how: str) -> object:
        shutil.rmtree(folder, ignore_errors=True)
        return opened(path, *how)

    monkeypatch.setattr(Path, "open", open_late)
    assert cache.hash_files(folder) == {}


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


# --- few enough for the disk, with real processes ---

USE = """
import json, shutil, sys, time
from pathlib import Path
from airflow_ai_provider.core.batch import Pin, digest_of
from airflow_ai_provider.core.infer import cache

def download(pin, registry, folder):
    for name in pin.files:
        (folder / name).write_bytes((Path(sys.argv[2]) / pin.name / name).read_bytes())
        if registry == "stop":
            print("filling", flush=True)
            sys.stdin.read()

cache._download = download
limit = int(sys.argv[4]) if sys.argv[4] else None
for text in sys.argv[5:]:
    pin = Pin.from_dict(json.loads(text))
    with cache.held(pin, sys.argv[1], sys.argv[3], byte_limit=limit) as folder:
        assert cache.differences(folder, pin.files) == []
        if sys.argv[3] == "hold":
            print("held", flush=True)
            sys.stdin.read()
        time.sleep(0.002)
        assert cache.differences(folder, pin.files) == []
"""
BYTES = 1000


class Machine:
    """A cache, a source of models to fill it from, and processes that use it."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.source = folder / "cache", folder / "source"
        self.cache.mkdir()
        self.started: list[subprocess.Popen[str]] = []

    def model(self, name: str) -> Pin:
        """Make a model of two files, a thousand bytes together."""
        folder = self.source / name
        folder.mkdir(parents=True)
        for file in ("MLmodel", "model.onnx"):
            (folder / file).write_bytes(name[0].encode() * (BYTES // 2))
        files = cache.hash_files(folder)
        return Pin(name, "1", "", digest_of(files), files, "onnx", {"inputs": [], "outputs": []})

    def use(self, *pins: Pin, how: str = "use", limit: int | None = None) -> subprocess.Popen[str]:
        """Start a process that uses one model after another."""
        given = [json.dumps(pin.to_dict()) for pin in pins]
        command = [sys.executable, "-c", USE, str(self.cache), str(self.source), how, str(limit or ""), *given]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    def has(self, *pins: Pin) -> bool:
        found = {path.name for path in self.cache.iterdir()}
        return found == {cache.folder_of(pin.digest, self.cache).name for pin in pins}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_least_recently_used_goes_first(machine: Machine) -> None:
    a, b, c = (machine.model(name) for name in "abc")
    assert machine.use(a, b, a, c, limit=2 * BYTES).wait(120) == 0
    assert machine.has(a, c), "b was used longest ago"
    assert machine.use(b).wait(120) == 0
    assert machine.has(a, b, c), "no limit"
    assert machine.use(b, limit=1).wait(120) == 0
    assert machine.has(b), "the one asked for stays, however large"


def test_what_was_compiled_of_a_model_counts_as_its_own_and_goes_with_it(machine: Machine) -> None:
    a, b = machine.model("a"), machine.model("b")
    assert machine.use(a, b).wait(120) == 0
    for pin in (a, b):
        folder = cache.builds_of(pin.digest, machine.cache) / "tensorrt/of-one-precision"
        folder.mkdir(parents=True)
        (folder / "engine").write_bytes(bytes(BYTES))
    with cache.held(b, machine.cache, byte_limit=4 * BYTES):
        assert cache.folder_of(a.digest, machine.cache).is_dir(), "all four are within the limit"
    with cache.held(b, machine.cache, byte_limit=3 * BYTES):
        assert not cache.folder_of(a.digest, machine.cache).exists()
        assert [path.name for path in (machine.cache / ".builds").iterdir()] == [b.digest.removeprefix("sha256:")]
        assert (cache.builds_of(b.digest, machine.cache) / "tensorrt/of-one-precision/engine").is_file()


def test_a_model_in_use_is_never_removed_and_a_killed_process_uses_none(machine: Machine) -> None:
    a, b = machine.model("a"), machine.model("b")
    user = machine.use(a, how="hold")
    assert said(user) == "held"
    assert machine.use(b, limit=1).wait(120) == 0
    assert machine.has(a, b)
    user.kill()
    user.wait()
    assert machine.use(b, limit=1).wait(120) == 0
    assert machine.has(b)


def test_what_a_killed_process_was_filling_is_cleared_away(machine: Machine) -> None:
    a, b = machine.model("a"), machine.model("b")
    filler = machine.use(a, how="stop")
    assert said(filler) == "filling"
    assert machine.use(b, limit=BYTES).wait(120) == 0
    assert not machine.has(b), "another process's half-filled folder is its own while it lives"
    filler.kill()
    filler.wait()
    assert machine.use(b, limit=BYTES).wait(120) == 0
    assert machine.has(b)


@pytest.mark.slow
def test_many_processes_in_a_cache_too_small_for_them(machine: Machine) -> None:
    """Each finds the right bytes in its model's folder all the while, whoever removes and fills what meanwhile."""
    pins = [machine.model(name) for name in "abcd"]
    orders = [[pins[(start + step) % 4] for step in range(12)] for start in range(4)]
    processes = [machine.use(*order, limit=2 * BYTES) for order in orders]
    victim = machine.use(*orders[0] * 20, limit=BYTES)
    time.sleep(0.8)
    victim.kill()
    assert [process.wait(200) for process in processes] == [0] * 4
    cache.evict(machine.cache, 2 * BYTES)
    assert len(list(machine.cache.iterdir())) <= 2
