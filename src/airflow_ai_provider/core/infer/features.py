"""Which way rows become the arrays that a model takes.

Invariants: every row keeps its place; a row that cannot become input (null, not finite, not an image) is a row error
and its place holds zeros; a column that cannot fit at all is a SignatureError before the first row.

What a model takes is read from its signature (MLflow's) and, where a tensor has no names, from its metadata:
``features`` (names of the columns), ``image`` (``{"resize": bool, "mean": [...], "std": [...]}``), ``sequence``
(:mod:`~airflow_ai_provider.core.infer.sequence`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.column import Column, Matrix, Scalar, separate_columns
from airflow_ai_provider.core.infer.inputs import Features, InputSpec, Several
from airflow_ai_provider.core.infer.tensor import Tensor
from airflow_ai_provider.errors import SignatureError


def features_of(pin: Pin, specs: Sequence[InputSpec], steps: int = 16) -> Features:
    """Choose how rows become inputs.

    :param pin: with the signature and metadata.
    :param specs: the session's inputs; empty when it does not say (torch): then the signature decides.
    :param steps: how fine the widths of sequences are (:func:`~airflow_ai_provider.core.infer.sequence.ladder`).
    :raises SignatureError: when no reading fits; no retry helps.
    """
    inputs = list(pin.signature["inputs"])
    if inputs[0].get("type") != "tensor":
        columns = [Column(i["name"], str(i.get("type")), not i.get("required", True)) for i in inputs]
        if len(specs) > 1:
            return separate_columns(columns, specs)
        return Matrix(columns, specs[0].dtype if specs else np.dtype(np.float32))
    names = [str(tensor.get("name") or "") for tensor in inputs]
    if len(set(names)) < len(names) or (len(names) > 1 and "" in names):
        raise SignatureError(
            f"model {pin.name} takes {len(names)} tensors, its signature names them {names}. Give each a name of its "
            "own: the rows' column of that name is what it takes.",
            name=pin.name,
        )
    tensors = _tensors(pin, inputs, specs)
    if "sequence" in pin.metadata or any(-1 in spec.shape[1:] for spec in tensors):
        return _sequences(pin, inputs, tensors, specs, steps)
    if len(tensors) > 1:
        named = list(pin.metadata.get("features") or [])
        names = named if len(named) == len(tensors) else [spec.name for spec in tensors]
        return Several([_one_of_several(pin, spec, name) for spec, name in zip(tensors, names, strict=True)])
    return _single(pin, inputs[0].get("name"), tensors[0])


def _tensors(pin: Pin, inputs: Sequence[Mapping[str, Any]], specs: Sequence[InputSpec]) -> list[InputSpec]:
    """Return the signature's tensors in the order of the session's inputs, in the session's types."""
    declared = []
    for tensor in inputs:
        described = tensor["tensor-spec"]
        shape = tuple(int(size) for size in described["shape"])
        declared.append(InputSpec(str(tensor.get("name") or ""), np.dtype(described["dtype"]), shape))
    if not specs:
        return declared
    if len(declared) == len(specs) == 1:
        return [InputSpec(declared[0].name, specs[0].dtype, declared[0].shape)]
    by_name = {spec.name: spec for spec in declared}
    unknown = sorted(set(by_name) - {spec.name for spec in specs})
    if unknown:
        raise SignatureError(
            f"the inputs of model {pin.name} are {[spec.name for spec in specs]}, its signature has {list(by_name)}. "
            "Give each tensor of the signature the name of its input.",
            inputs=[spec.name for spec in specs],
        )
    # an input that the signature leaves out keeps the session's shape: a mask may be made
    return [InputSpec(s.name, s.dtype, by_name[s.name].shape if s.name in by_name else s.shape) for s in specs]


def _sequences(
    pin: Pin,
    inputs: Sequence[Mapping[str, Any]],
    tensors: Sequence[InputSpec],
    specs: Sequence[InputSpec],
    steps: int,
) -> Features:
    from airflow_ai_provider.core.infer.sequence import Padding, SequenceInputs

    fixed = {spec.shape[1] for spec in tensors if len(spec.shape) == 2 and spec.shape[1] > 0}
    if any(len(spec.shape) != 2 for spec in tensors) or len(fixed) > 1:
        raise SignatureError(
            f"model {pin.name} takes {[(spec.name, spec.shape) for spec in tensors]}: besides the first size only the "
            "length of lists of numbers may vary, in tensors of shape (-1, -1). Log it with a signature that names the "
            "other sizes.",
            name=pin.name,
        )
    given = dict(pin.metadata.get("sequence") or {})
    if fixed:
        given["widths"] = sorted(fixed)
    named = list(pin.metadata.get("features") or [])
    names = [spec.name for spec in tensors]
    if len(tensors) == 1 and not named:
        names = [inputs[0].get("name") or (specs[0].name if specs else "input_ids")]
        tensors = [InputSpec(names[0], tensors[0].dtype, tensors[0].shape)]
    columns = dict(zip(names, named or names, strict=False))
    return SequenceInputs(tensors, dict(zip(names, names, strict=True)) | columns, Padding.of(given, steps))


def _one_of_several(pin: Pin, spec: InputSpec, name: str) -> Features:
    if len(spec.shape) == 1 or spec.shape[1:] == (1,):
        return Scalar(Column(name, "double", False), spec)
    _demand_sizes(pin, spec)
    return Tensor(spec.shape[1:], spec.dtype, [name], pin, guess=False)


def _single(pin: Pin, name: str | None, spec: InputSpec) -> Features:
    named = pin.metadata.get("features")
    _demand_sizes(pin, spec)
    if named and len(spec.shape) == 2 and len(named) == spec.shape[1]:
        return Matrix([Column(column, "double", False) for column in named], spec.dtype)
    return Tensor(spec.shape[1:], spec.dtype, list(named or [n for n in [name] if n]), pin)


def _demand_sizes(pin: Pin, spec: InputSpec) -> None:
    if any(size < 1 for size in spec.shape[1:]) or len(spec.shape) < 2:
        raise SignatureError(
            f"model {pin.name} takes a tensor of shape {spec.shape}: only the first size may vary, and the length of "
            "a list of numbers. Log it with a signature that names the other sizes.",
            name=pin.name,
            shape=spec.shape,
        )
