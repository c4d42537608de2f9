"""Torch files that would run code when loaded are refused without being loaded."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from airflow_ai_provider.core.infer.archive import demand_safe
from airflow_ai_provider.core.infer.engine import open_engine
from airflow_ai_provider.errors import ModelPinError
from tests.core.infer import models


class Bomb:
    """Unpickling it makes a file, which a test looks for."""

    path = ""

    def __reduce__(self) -> Any:
        return (open, (Bomb.path, "w"))


@pytest.fixture(autouse=True)
def trap(tmp_path: Path) -> Any:
    Bomb.path = str(tmp_path / "it-ran")
    yield
    assert not Path(Bomb.path).exists(), "the file's code was run"


def rewritten(target: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes] | None = None) -> Path:
    """Copy the digit net's archive, changing its records."""
    source = models.digit_torch()[1] / "data" / "model.pt2"
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(target, "w") as made:
        for name in given.namelist():
            made.writestr(name, change(name, given.read(name)))
        root = given.namelist()[0].partition("/")[0]
        for name, content in (more or {}).items():
            made.writestr(f"{root}/{name}", content)
    return target


def graph(edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


def call(target: str) -> Callable[[str, bytes], bytes]:
    def edit(value: Any) -> None:
        value["graph_module"]["graph"]["nodes"][0]["target"] = target

    return graph(edit)


def compute(text: str) -> Callable[[str, bytes], bytes]:
    def edit(value: Any) -> None:
        def walk(item: Any) -> None:
            for key, inner in item.items() if isinstance(item, dict) else enumerate(item):
                if key == "expr_str":
                    item[key] = text
                elif isinstance(inner, dict | list):
                    walk(inner)

        walk(value)

    return graph(edit)


def saved(value: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def same(name: str, content: bytes) -> bytes:
    return content


def test_what_torch_export_writes_is_opened(tmp_path: Path) -> None:
    demand_safe(rewritten(tmp_path / "model.pt2", same), "m")


def test_shapes_computed_from_shapes_are_harmless(tmp_path: Path) -> None:
    text = "Max(Integer(2), FloorDiv(Symbol('s31', positive=True, integer=True), 4) + 1)"
    demand_safe(rewritten(tmp_path / "model.pt2", compute(text)), "m")


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torch.load", "torch.hub.load", "torch.ops.load_library", "os.system", "#x:y", "_operator.__x"],
)
def test_a_graph_that_calls_anything_but_operators_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(ModelPinError, match=f"calls {target}"):
        demand_safe(rewritten(tmp_path / "model.pt2", call(target)), "model m version 1")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('it-ran', 'w')",
        "Symbol('s0').__class__",
        "lambdify(s0, s0)",
        "S('s0')",
        "[s0 for s0 in (1,)]",
        "Symbol('s0', positive=exec)",
    ],
)
def test_a_shape_that_is_more_than_arithmetic_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelPinError, match="computes "):
        demand_safe(rewritten(tmp_path / "model.pt2", compute(text)), "m")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data/constants/custom_obj_0": pickle.dumps(Bomb())}, "neither text nor a saved tensor"),
        ({"data/sample_inputs/other.pt": saved(Bomb())}, "more than tensors"),
        ({"data/weights/model.pt": saved({"w": Bomb()})}, "more than tensors"),
        ({"data/aotinductor/model/model.so": b"\x7fELF"}, "compiled library"),
        ({"models/model.json": b"{}"}, "two records of the same name"),
    ],
)
def test_records_that_hold_more_than_tensors_are_refused(tmp_path: Path, more: dict[str, bytes], said: str) -> None:
    with pytest.raises(ModelPinError, match=said):
        demand_safe(rewritten(tmp_path / "model.pt2", same, more), "m")


def test_sample_inputs_that_are_a_bomb_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        return saved(((Bomb(),), {})) if "/sample_inputs/" in name else content

    pin, original = models.digit_torch()
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    rewritten(folder / "data" / "model.pt2", change)
    with pytest.raises(ModelPinError, match="loading it could run code"):
        open_engine(models.pin_folder(folder, "torch", dict(pin.signature)), folder, "cpu")


def test_a_tensor_that_is_said_to_be_pickled_is_looked_into(tmp_path: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        if name.endswith("weights/model_weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return saved(Bomb()) if name.endswith("/weight_0") else content

    with pytest.raises(ModelPinError, match="weight_"):
        demand_safe(rewritten(tmp_path / "model.pt2", change), "m")


def test_a_pickled_net_is_refused(tmp_path: Path) -> None:
    for name in ("model.pth", "model.pt2"):
        torch.save(torch.nn.Linear(2, 2), tmp_path / name)
        with pytest.raises(ModelPinError, match="serialization_format='pt2'"):
            demand_safe(tmp_path / name, "m")
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelPinError, match="it is a pickle"):
        demand_safe(tmp_path / "model.pth", "m")
