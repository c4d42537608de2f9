"""The door to ONNX Runtime's quantisation: a model with weights of eight bits, made of one with floats.

Invariants: the result takes and gives what the original does; a model in which nothing could be quantised is an error,
not a copy; the original's file is only read.

Source of both methods: ONNX Runtime, Quantize ONNX Models. Dynamic: weights ahead, activations as they come. Static:
both ahead, the ranges of the activations taken from rows given for that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airflow_ai_provider.errors import MissingExtraError, SpecError

try:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError as error:
    raise MissingExtraError(
        f"quantising needs onnx and onnxruntime ({error}). Run: pip install 'airflow-ai-provider[quantize]'",
        extra="quantize",
    ) from error

METHODS = ("dynamic", "static")
# What int8 makes of a model. Convolutions are left out of the dynamic method: measured, they became six times slower.
_MADE = {"DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"}
_DYNAMIC = ["MatMul", "Gemm", "Attention", "LSTM", "Gather", "EmbedLayerNormalization"]


def quantize(source: Path, target: Path, method: str, calls: Iterable[dict[str, Any]]) -> None:
    """Write a model with weights of eight bits.

    :param source: the ONNX file.
    :param target: file to write.
    :param method: ``dynamic`` or ``static``.
    :param calls: what the model is given for some hundred rows, from which the static method takes the ranges: input
        name → array, call by call.
    :raises SpecError: when the method is unknown, or finds nothing to quantise; a retry does not help.
    """
    if method not in METHODS:
        raise SpecError(f"method {method!r} is none of {', '.join(METHODS)}.", faults=[("method", "unknown")])
    try:
        kinds = _write(source, target, method, _Calls(calls))
    except ValueError as error:  # a model of scikit-learn's operators alone, which the tool does not read
        kinds, why = set(), str(error)
    else:
        why = f"it has the operators {', '.join(sorted(kinds))}"
    if not kinds & _MADE:
        raise SpecError(
            f"the {method} method found nothing to quantise in {source.name}: {why}. Trees and linear models of "
            "scikit-learn stay as they are; try the other method on a net.",
            faults=[("method", "found nothing to quantise")],
        )


def _write(source: Path, target: Path, method: str, calls: _Calls) -> set[str]:
    """Write the new model and return its kinds of operators."""
    whole, prepared = target.with_suffix(".whole.onnx"), target.with_suffix(".prepared.onnx")
    logging.getLogger().addFilter(_is_news)
    try:
        # one file: the preparation cannot read weights that lie beside the model, as MLflow stores them
        onnx.save(onnx.load(str(source)), str(whole))
        # shapes must be known for the ranges; what torch exports is not read by the quantiser without this
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        if method == "dynamic":
            quantize_dynamic(prepared, target, op_types_to_quantize=_DYNAMIC, weight_type=QuantType.QInt8)
        else:
            quantize_static(
                prepared,
                target,
                calls,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # eight by eight bits can overflow sixteen where the processor has no VNNI
                reduce_range=True,
            )
    finally:
        for scrap in (whole, prepared):
            scrap.unlink(missing_ok=True)
        logging.getLogger().removeFilter(_is_news)
    return {node.op_type for node in onnx.load(str(target), load_external_data=False).graph.node}


class _Calls(CalibrationDataReader):  # type: ignore[misc]  # untyped there
    """What a model is given, one call after the other."""

    def __init__(self, calls: Iterable[dict[str, Any]]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._calls, None)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop the tool's advice to prepare the model, which was done, and a line for each weight that has one scale."""
    said = record.getMessage()
    return "pre-processing" not in said and "out-of-range for weight" not in said
