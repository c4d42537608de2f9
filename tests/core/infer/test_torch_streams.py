"""The order of copies and calls on a GPU, over streams that only note what they are asked: no GPU is needed for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from airflow_ai_provider.core.infer.engine import open_engine
from tests.core.infer import models


class Stream:
    """A stream that notes who waits for whom."""

    def __init__(self, said: list[str], name: str) -> None:
        self._said, self.name = said, name

    def wait_stream(self, other: Stream) -> None:
        self._said.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._said.append(f"the answer waits for {self.name}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in its order; memory of a GPU is this machine's own."""
    noted: list[str] = []
    computing, empty, to = Stream(noted, "calls"), torch.empty, torch.Tensor.to

    def moved(tensor: torch.Tensor, *where: Any, **how: Any) -> torch.Tensor:
        if where[:1] in {("cuda",), ("cpu",)}:
            noted.append(f"to {where[0]}{' by itself' if how.get('non_blocking') else ''}")
            return tensor.clone()
        return to(tensor, *where, **how)

    def paged(*size: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            noted.append("on pinned pages")
        return empty(*size, **more)

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(noted, "copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: noted.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch, "empty", paged)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return noted


def test_rows_go_up_before_the_call_and_answers_come_down_after_it(said: list[str]) -> None:
    table = models.digit_rows().slice(0, 32)
    with open_engine(*models.digit_torch(), "cpu") as engine:
        expected = engine.predict(table, 32)
        said.clear()
        engine.device = "cuda"
        found = engine.predict(table, 32)
        engine.device = "cpu"
    assert found.equals(expected)
    assert said == [
        "on pinned pages",
        "to cuda by itself",
        "calls waits for copies",
        "kept for calls",
        "copies waits for calls",
        "to cpu by itself",
        "kept for copies",
        "the answer waits for copies",
    ]
