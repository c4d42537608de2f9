"""Which torch files may be opened: those that hold a graph and tensors, not a program.

Invariants: nothing here unpickles or runs anything, or needs torch: files are read, not loaded.
A check, not a sandbox: it closes the known ways by which a file from ``torch.export`` runs code when it is loaded
(pickled objects, operators outside torch's own, symbolic expressions, compiled libraries). Pin models you trust.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from airflow_ai_provider.errors import ModelTrustError

# What a graph may call: torch's own operators and arithmetic on shapes. Anything reachable from the module torch
# would else be callable by name, torch.os.system among it.
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims?|higher_order|torchvision|quantized_decomposed)\.\w+(\.\w+)?"
    r"|torch\.sym_\w+|_operator\.[a-z]\w*|math\.[a-z]\w*"
)
# torch evaluates these texts as Python (sympify), so only shape arithmetic passes.
_SYMBOL = re.compile(r"[suzf]+\d+")
_EXPRESSION = re.compile(r"[\w\s,.()'=+\-*/<>]*")
_EXPRESSION_NAME = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|ModularIndexing|Where"
    r"|Eq|Ne|Lt|Le|Gt|Ge|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|And|Or|Not|Identity|ToFloat|TruncToInt"
    r"|FloorToInt|CeilToInt|RoundToInt|IntTrueDiv|FloatTrueDiv|true|false|True|False|positive|negative|nonnegative"
    r"|nonpositive|integer|real|zero|nonzero|evaluate|precision"
)
_SHORT_TEXT = re.compile(rb"[A-Za-z0-9._-]{1,64}\n?")
# What a pickled tensor is built from.
_TENSOR_NAME = re.compile(
    r"torch \w+Storage|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|collections OrderedDict"
    r"|torch\.storage UntypedStorage|torch (Size|device)"
)
_RAW = ("weight_", "tensor_")


def torch_files(files: Mapping[str, str]) -> list[str]:
    """Return the paths of torch model files among the artifact files."""
    return [path for path in sorted(files) if path.endswith((".pt2", "model.pth", ".torchscript"))]


def is_torchscript(path: Path) -> bool:
    """Tell whether a file is TorchScript (its own code and constants), which torch reads without Python's pickle."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def demand_safe(path: Path, what: str) -> None:
    """Refuse a torch file that would run code when it is loaded.

    :param path: the model file.
    :param what: the model, for the message.
    :raises ModelTrustError: when it is a pickle or holds what is not a graph or a tensor; no retry helps.
    """
    if is_torchscript(path):
        return
    for fault in _faults(path):
        raise ModelTrustError(
            f"{what}: {path.name} is not opened, because loading it could run code: {fault}. Register the model by "
            "mlflow.pytorch.log_model(..., serialization_format='pt2'), or as ONNX.",
            path=path.name,
            fault=fault,
        )


def _faults(path: Path) -> Iterator[str]:
    """Yield what speaks against a file as an archive of ``torch.export``."""
    if not zipfile.is_zipfile(path) or path.suffix != ".pt2":
        yield "it is a pickle, neither an archive of torch.export nor TorchScript"
        return
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if len(set(names)) != len(names):
            yield "it holds two records of the same name"
        raw = _raw_records({name: archive.read(name) for name in names if name.endswith("_config.json")})
        for name in names:
            if "/data/aotinductor/" in f"/{name}":
                yield f"record {name} is a compiled library"
            elif name not in raw and (fault := _fault_of(archive.read(name))):
                yield f"record {name} {fault}"


def _raw_records(configs: Mapping[str, bytes]) -> set[str]:
    """Return the records that torch reads as plain tensor bytes."""
    raw: set[str] = set()
    pickled: set[str] = set()
    for name, content in configs.items():
        entries = json.loads(content).get("config") or {}
        for entry in entries.values():
            record = f"{name.rpartition('/')[0]}/{entry['path_name']}"
            plain = entry.get("use_pickle") is False and entry["path_name"].startswith(_RAW)
            (raw if plain else pickled).add(record)
    return raw - pickled


def _fault_of(content: bytes) -> str:
    """Say why a record that is no plain tensor is not harmless; empty when it is."""
    if not content or _SHORT_TEXT.fullmatch(content):
        return ""
    try:
        graph = json.loads(content)
    except ValueError:
        return _fault_of_pickle(content)
    return next(_graph_faults(graph), "")


def _fault_of_pickle(content: bytes) -> str:
    """Read, without running it, which names a saved tensor's pickle asks for."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return "is neither text nor a saved tensor"
    with zipfile.ZipFile(io.BytesIO(content)) as saved:
        pickles = [name for name in saved.namelist() if name.endswith(".pkl")]
        try:
            steps = list(pickletools.genops(saved.read(pickles[0]))) if len(pickles) == 1 else []
        except ValueError:
            steps = []
    if not steps:
        return "is a pickle that cannot be read"
    for step, argument, _ in steps:
        if step.name == "GLOBAL" and _TENSOR_NAME.fullmatch(str(argument)):
            continue
        if step.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            return f"is a pickle of more than tensors ({argument or step.name})"
    return ""


def _graph_faults(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _graph_faults(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "nodes":
                calls = (str(node.get("target")) for node in item)
                yield from (f"calls {call[:80]}" for call in calls if not _TARGET.fullmatch(call))
            if key == "expr_str" and not _is_shape_arithmetic(item):
                yield f"computes {str(item)[:80]}"
            elif key != "metadata":
                yield from _graph_faults(item)


def _is_shape_arithmetic(text: Any) -> bool:
    if not isinstance(text, str) or not _EXPRESSION.fullmatch(text) or re.search(r"\.\s*[A-Za-z_]", text):
        return False
    names = re.findall(r"[A-Za-z_]\w*", text)
    return all(_EXPRESSION_NAME.fullmatch(name) or _SYMBOL.fullmatch(name) for name in names)
