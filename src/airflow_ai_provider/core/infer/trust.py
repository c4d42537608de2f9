"""What may be opened of a registered model: data by default, code where the author names the model.

Invariants: nothing is opened here; a format that runs code when loaded needs its model's name in ``allow_pickle``, one
by one; a model that is only served elsewhere is pinned by its bytes and never opened on this machine.

=====================  ==============================================================================================
``onnx``               a graph: opened
``torch``              ``torch.export`` archive or TorchScript, when :mod:`.archive` finds no code in it: opened
``pyfunc``             anything that MLflow loads by unpickling or by the model's own code: opened where it is named
``served``             the same, where the model is predicted with on a model server: not opened
safetensors            numbers without a graph: no program says what to compute with them, so none can be opened alone
=====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airflow_ai_provider.core.infer import archive
from airflow_ai_provider.errors import ModelPinError, ModelTrustError


@dataclass(frozen=True)
class Trust:
    """How far a registry's models are trusted.

    :param allow_pickle: names of registered models that may be unpickled, which lets their files run code here.
    :param served: the model runs on a model server: whatever its format, it is pinned and not opened.
    :param signed_by: PEM text of the public key or certificate whose signature a model must have; empty asks for none.
    """

    allow_pickle: Collection[str] = frozenset()
    served: bool = False
    signed_by: str = ""


def flavor_of(
    described: Mapping[str, Any], files: Mapping[str, str], folder: Path, trust: Trust, *, name: str, version: str
) -> str:
    """Say by which engine a model is opened.

    :param described: the MLmodel file.
    :param files: path → digest of each artifact file.
    :param folder: where they lie.
    :return: ``onnx``, ``torch``, ``pyfunc`` or ``served``.
    :raises ModelTrustError: it could run code when it is opened, and is not named in ``allow_pickle``; a retry does not
        help.
    :raises ModelPinError: no engine opens it; a retry does not help.
    """
    flavors = described.get("flavors") or {}
    what = f"model {name} version {version}"
    if "onnx" in flavors:
        return "onnx"
    try:
        if "pytorch" in flavors and archive.torch_files(files):
            archive.demand_safe(folder / archive.torch_files(files)[0], what)
            return "torch"
        raise _refused(flavors, files, name, what)
    except ModelTrustError:
        if trust.served:
            return "served"
        if name not in trust.allow_pickle:
            raise
    if "python_function" not in flavors:
        raise ModelPinError(
            f"{what} may be unpickled, but has no python_function flavor, by which it would be opened; it has "
            f"{', '.join(sorted(flavors)) or 'none'}. Log it through mlflow's own log_model of its library.",
            flavors=sorted(flavors),
        )
    return "pyfunc"


def _refused(flavors: Mapping[str, Any], files: Mapping[str, str], name: str, what: str) -> ModelTrustError:
    names = sorted(set(flavors) - {"python_function"}) or sorted(flavors)
    weights = [path for path in files if path.endswith(".safetensors")]
    why = (
        f"whose safetensors weights ({weights[0]}) are numbers without a graph: the program around them is code"
        if weights
        else "which its library's own loader opens; most of those unpickle, and a pickle is code"
    )
    return ModelTrustError(
        f"{what} has flavor {', '.join(names) or 'none'}, {why}. "
        "Register it as ONNX (skl2onnx, onnxmltools or torch.onnx, then mlflow.onnx.log_model), or a torch model by "
        "mlflow.pytorch.log_model(..., serialization_format='pt2'); predict with it on a model server; or, if you "
        f"trust who registers it as you trust your own code, name it: allow_pickle=[{name!r}].",
        flavors=names,
    )
