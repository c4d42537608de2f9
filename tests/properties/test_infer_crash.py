"""Crash inference anywhere, run it again, compare the world: every row once, the same bytes, no work done twice."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_ai_provider.core.batch import ROW_ID, BatchRef
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.testing import ArithmeticEngine
from tests.core.infer.batches import PIN, land, part_files, rows


class PowerCutError(Exception):
    """The crash."""


class Fuse:
    """Let so many steps pass, then fail at each."""

    def __init__(self, steps: int) -> None:
        self._left, self._lock = steps, threading.Lock()

    def burn(self, *_: object) -> None:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                raise PowerCutError


class FragileStore(Store):
    """A real store whose disk fails after some writes, before or after the bytes are in place."""

    def __init__(self, root: str, fuse: Fuse, after: bool) -> None:
        super().__init__(root)
        self._fuse, self._after = fuse, after

    def write_bytes(self, path: str, data: bytes) -> None:
        if not self._after:
            self._fuse.burn()
        super().write_bytes(path, data)
        if self._after:
            self._fuse.burn()


def predict(batch: BatchRef, store: Store, engine: ArithmeticEngine, batch_size: int) -> BatchRef:
    return infer(batch, PIN, store, engine, pipeline="p", batch_size=batch_size, progress=lambda line: None)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    batch_size=st.integers(1, 50),
    crash_in_model=st.booleans(),
    steps=st.integers(0, 25),
    after=st.booleans(),
    again=st.integers(1, 50),
)
def test_a_crash_loses_nothing_doubles_nothing_and_changes_no_byte(
    *, sizes: list[int], batch_size: int, crash_in_model: bool, steps: int, after: bool, again: int
) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [rows(size, start=start) for size, start in zip(sizes, starts, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        whole, store = Store(f"{folder}/whole"), Store(f"{folder}/crashed")
        expected = predict(land(whole, parts), whole, ArithmeticEngine(["x", "y"]), batch_size)
        batch = land(store, parts)
        fuse = Fuse(steps)
        fragile = store if crash_in_model else FragileStore(store.root, fuse, after)
        first = ArithmeticEngine(["x", "y"], before=fuse.burn if crash_in_model else lambda rows: None)
        crashed = False
        try:
            predict(batch, fragile, first, batch_size)
        except PowerCutError:
            crashed = True
        marks = sorted(Path(store.root).rglob("*.done"))
        done = {int(mark.name.split(".", maxsplit=1)[0]) for mark in marks}
        second = ArithmeticEngine(["x", "y"])
        ref = predict(batch, store, second, again)
        missing = [row for i, part in enumerate(parts) if i not in done for row in part[ROW_ID].to_pylist()]
        assert sorted(second.seen) == sorted(missing), "a retry predicts what was not done, once"
        assert crashed or not missing
        assert part_files(store, ref) == part_files(whole, expected)
        assert store.manifest(ref).counts == whole.manifest(expected).counts
        ids = pa.concat_tables(store.read(ref))[ROW_ID].to_pylist()
        assert ids == [row for part in parts for row in part[ROW_ID].to_pylist()]
