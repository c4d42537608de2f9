"""Ours in the cases that predict: the whole verb, a landed batch in, landed predictions out."""

from __future__ import annotations

import json
import shutil
import time

from airflow_ai_provider.core.batch import BatchRef, Pin
from airflow_ai_provider.core.infer.batch_size import SizeMemory
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.store import Store
from benchmarks import gpu
from benchmarks.harness import Place, Run


def open_verb(place: Place, device: str) -> Run:
    """Predict the batch that the case has landed with the model that it has pinned.

    :param device: as the operator takes it; on a GPU each run says how busy that was.
    """
    pin = Pin.from_dict(json.loads((place.folder / "pin.json").read_text(encoding="utf-8")))
    batch = BatchRef.from_dict(json.loads((place.folder / "batch.json").read_text(encoding="utf-8")))
    store = Store(str(place.folder / "store"))
    engine = open_engine(pin, place.folder / "model", device)
    memory = SizeMemory(place.folder / "models")  # as the operator has it: a warm worker knows the model's best size

    def run() -> float:
        shutil.rmtree(place.folder / "store/ours", ignore_errors=True)
        with gpu.watched("ours", engine.device):
            started = time.perf_counter()
            infer(batch, pin, store, engine, pipeline="ours", memory=memory)
            return time.perf_counter() - started

    return run
