"""Rows as a model's inputs: what fits, what fails as a row, what cannot fit at all."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import traceback
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.infer.features import features_of
from airflow_ai_provider.core.infer.inputs import Features, InputSpec
from airflow_ai_provider.errors import SignatureError
from tests.core.infer.models import columns_signature, png, tensor_signature

FLOAT = InputSpec("X", np.dtype(np.float32), (-1, 2))


def features(signature: dict[str, Any], *specs: InputSpec, **metadata: Any) -> Features:
    return features_of(Pin("m", "1", "", "", {}, "onnx", signature, metadata), specs)


def matrix(rows: dict[str, Any], names: list[str], **options: Any) -> tuple[list[list[float]], dict[int, str]]:
    made = features(columns_signature(names, **options), FLOAT)
    table = pa.table(rows)
    made.needs(table.schema)
    inputs = made.read(table)
    return inputs.arrays[0].tolist(), inputs.errors


# --- named columns ---


def test_columns_stand_in_the_signatures_order_whatever_the_rows_order() -> None:
    assert matrix({"b": [3.0, 4.0], "z": ["", ""], "a": [1.0, 2.0]}, ["a", "b"]) == ([[1, 3], [2, 4]], {})


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 0], pa.int64()),
        pa.array([1, 0], pa.uint8()),
        pa.array([True, False]),
        pa.array([1.0, 0.0], pa.float32()),
        pa.array([Decimal("1.0"), Decimal("0.0")]),
        pa.chunked_array([pa.array([1.0]), pa.array([0.0])]),
    ],
    ids=lambda column: str(column.type),
)
def test_every_kind_of_number_becomes_float32(column: pa.Array) -> None:
    assert matrix({"a": column, "b": [0.5, 0.5]}, ["a", "b"]) == ([[1, 0.5], [0, 0.5]], {})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null_value: a is null"),
        (float("nan"), "not_finite: a=nan is no finite float32"),
        (float("-inf"), "not_finite: a=-inf is no finite float32"),
        (1e300, "not_finite: a=1e+300 is no finite float32"),
    ],
)
def test_a_value_that_no_model_can_take_fails_its_row_alone(value: float | None, said: str) -> None:
    assert matrix({"a": [1.0, value, 3.0], "b": [1.0, 2.0, 3.0]}, ["a", "b"]) == ([[1, 1], [0, 0], [3, 3]], {1: said})


def test_a_null_among_integers_fails_its_row_alone() -> None:
    column = pa.array([2**53, None, 3], pa.int64())
    values, errors = matrix({"a": column, "b": [1, 1, 1]}, ["a", "b"])
    assert values == [[float(2**53), 1], [0, 0], [3, 1]]
    assert errors == {1: "null_value: a is null"}


def test_a_column_of_nulls_fails_every_row() -> None:
    assert matrix({"a": pa.nulls(2), "b": [1.0, 2.0]}, ["a", "b"])[1] == {0: "null_value: a is null"} | {
        1: "null_value: a is null"
    }


def test_an_optional_column_may_be_null_or_absent_and_is_nan() -> None:
    values, errors = matrix({"a": [1.0, 2.0], "b": [None, 4.0]}, ["a", "b"], optional=("b",))
    assert errors == {} and np.isnan(values[0][1]) and values[1] == [2, 4]
    values, errors = matrix({"a": [1.0, None]}, ["a", "b"], optional=("b",))
    assert errors == {1: "null_value: a is null"} and np.isnan(values[0][1])
    assert matrix({"a": [1.0], "b": [float("inf")]}, ["a", "b"], optional=("b",))[1].keys() == {0}


def test_a_required_column_that_is_absent_is_named() -> None:
    made = features(columns_signature(["a", "b", "c"]), FLOAT)
    with pytest.raises(SignatureError, match="no column b, c, which"):
        made.needs(pa.schema({"a": pa.float64(), "d": pa.float64()}))


def test_texts_where_the_model_takes_numbers_are_named() -> None:
    made = features(columns_signature(["a", "b"]), FLOAT)
    with pytest.raises(SignatureError, match=r"b \(string\)"):
        made.needs(pa.schema({"a": pa.float64(), "b": pa.string()}))


def test_a_signature_with_texts_needs_one_input_per_column() -> None:
    signature = {"inputs": [{"type": "string", "name": "colour"}, {"type": "double", "name": "a"}], "outputs": []}
    with pytest.raises(SignatureError, match="colour"):
        features(signature, FLOAT)
    made = features(
        signature, InputSpec("colour", np.dtype(object), (-1, 1)), InputSpec("a", np.dtype(np.float32), (-1, 1))
    )
    table = pa.table({"a": [1.0, None, 3.0], "colour": ["red", "blue", None]})
    assert set(made.needs(table.schema)) == {"a", "colour"}
    inputs = made.read(table)
    assert inputs.arrays[0].tolist() == [["red"], ["blue"], [""]]
    assert inputs.arrays[1].tolist() == [[1], [0], [3]]
    assert inputs.errors == {1: "null_value: a is null", 2: "null_value: colour is null"}


def test_separate_inputs_must_have_the_columns_names() -> None:
    one, two = InputSpec("a", np.dtype(np.float32), (-1, 1)), InputSpec("x", np.dtype(np.float32), (-1, 1))
    with pytest.raises(SignatureError, match=r"\['a', 'x'\]"):
        features(columns_signature(["a", "b"]), one, two)


# --- tensors ---


def test_a_tensor_of_columns_takes_their_names_from_the_metadata() -> None:
    made = features(tensor_signature(2), FLOAT, features=["b", "a"])
    assert made.needs(pa.schema({"a": pa.float64(), "b": pa.float64()})) == ["b", "a"]
    assert made.read(pa.table({"a": [1.0], "b": [2.0]})).arrays[0].tolist() == [[2, 1]]


def test_a_tensor_may_lie_in_one_column_of_lists() -> None:
    made = features(tensor_signature(2, 2))
    good, short, holed = [1.0, 2.0, 3.0, 4.0], [1.0], [1.0, None, 3.0, 4.0]
    table = pa.table({"_row_id": list("abcd"), "v": pa.array([good, short, None, holed])})
    assert made.needs(table.schema) == ["v"]
    inputs = made.read(table)
    assert inputs.arrays[0][0].tolist() == [[1, 2], [3, 4]]
    assert {row: reason.split(":")[0] for row, reason in inputs.errors.items()} == {
        1: "wrong_shape",
        2: "null_value",
        3: "not_finite",
    }


def test_a_tensor_that_no_column_or_several_could_hold_says_how_to_name_it() -> None:
    made = features(tensor_signature(2, 2))
    with pytest.raises(SignatureError, match="none could hold it.*metadata"):
        made.needs(pa.schema({"a": pa.float64()}))
    lists = pa.list_(pa.float32())
    with pytest.raises(SignatureError, match=r"\['u', 'v'\] could hold it"):
        made.needs(pa.schema({"u": lists, "v": lists}))
    named = features(tensor_signature(2, 2), features=["v"])
    assert named.needs(pa.schema({"u": lists, "v": lists})) == ["v"]


@pytest.mark.parametrize("shape", [(), (3, -1, 8)])
def test_only_the_number_of_rows_and_the_length_of_a_list_may_vary(shape: tuple[int, ...]) -> None:
    with pytest.raises(SignatureError, match="besides the first size|only the first size may vary"):
        features(tensor_signature(*shape))


# --- several inputs ---


def tensors(**shapes: tuple[int, ...]) -> dict[str, Any]:
    inputs = [
        {"type": "tensor", "name": name, "tensor-spec": {"dtype": "float32", "shape": [-1, *shape]}}
        for name, shape in shapes.items()
    ]
    return {"inputs": inputs, "outputs": []}


def spec(name: str, dtype: Any, *shape: int) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), (-1, *shape))


def test_several_tensors_come_from_the_columns_of_their_names_in_the_sessions_order() -> None:
    made = features(
        tensors(v=(2,), age=(1,), w=(2, 2)),
        spec("w", np.float32, 2, 2),
        spec("age", np.int64, 1),
        spec("v", np.float32, 2),
    )
    table = pa.table({"age": [30, 31], "v": [[1.0, 2.0], [3.0]], "w": [[1.0] * 4, [2.0] * 4], "bytes": [b"", b""]})
    assert made.needs(table.schema) == ["w", "age", "v"]
    inputs = made.read(table)
    assert [array.shape for array in inputs.arrays] == [(2, 2, 2), (2, 1), (2, 2)]
    assert inputs.arrays[1].dtype == np.int64 and inputs.arrays[2].tolist() == [[1, 2], [0, 0]]
    assert inputs.errors == {1: "wrong_shape: v holds 1 numbers, the model takes 2"}
    assert [array.shape for array in made.sample(0.0)] == [(2, 2, 2), (2, 1), (2, 2)]
    with pytest.raises(SignatureError, match="from column v"):
        made.needs(table.drop_columns(["v"]).schema)


def test_columns_of_several_tensors_may_have_other_names() -> None:
    made = features(tensors(a=(2,), b=(1,)), features=["left", "right"])
    table = pa.table({"right": [5.0], "left": [[1.0, 2.0]]})
    assert [array.tolist() for array in made.read(table).arrays] == [[[1, 2]], [[5]]]


def test_several_tensors_without_names_of_their_own_are_refused() -> None:
    signature = {"inputs": tensor_signature(2)["inputs"] * 2, "outputs": []}
    with pytest.raises(SignatureError, match="takes 2 tensors"):
        features(signature)
    with pytest.raises(SignatureError, match=r"\['X'\], its signature has \['a', 'b'\]"):
        features(tensors(a=(2,), b=(1,)), FLOAT)


def test_an_optional_input_of_its_own_may_be_absent() -> None:
    signature = columns_signature(["a", "b", "c"], optional=("a", "b"))
    made = features(signature, spec("a", np.float32, 1), spec("b", object, 1), spec("c", np.int64))
    table = pa.table({"c": [1, 2]})
    assert made.needs(table.schema) == ["c"]
    a, b, c = made.read(table).arrays
    assert np.isnan(a).all() and a.shape == (2, 1) and b.tolist() == [[""], [""]] and c.tolist() == [1, 2]
    holes = pa.table({"a": [None, float("inf")], "b": [None, "x"], "c": [1, 2]})
    assert made.read(holes).errors == {1: "not_finite: a=inf is no finite float32"}
    with pytest.raises(SignatureError, match="no column c"):
        made.needs(pa.schema({"a": pa.float64()}))


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        (np.int64, 1.5, "wrong_type: a=1.5 is no int64"),
        (np.int8, 300, "wrong_type: a=300 is no int8"),
        (np.uint8, -1, "wrong_type: a=-1 is no uint8"),
        (np.int32, Decimal("2.5"), "wrong_type: a=Decimal('2.5') is no int32"),
        (np.int64, float("nan"), "not_finite: a=nan is no finite int64"),
        (np.int64, None, "null_value: a is null"),
        (np.bool_, 2.0, "wrong_type: a=2.0 is no bool"),
    ],
)
def test_a_number_that_the_type_cannot_hold_fails_its_row_instead_of_being_cut(
    dtype: Any, value: Any, said: str
) -> None:
    column = [type(value)(1) if value is not None else 1, value]
    wants = columns_signature(["a", "b"], optional=("a",))
    alone = features(wants, spec("a", dtype, 1), spec("b", np.float32, 1)).read(pa.table({"a": column, "b": [1.0] * 2}))
    assert alone.errors == {1: said} and alone.arrays[0].tolist() == [[1], [0]]
    if dtype is not np.bool_:
        together = features(wants, spec("X", dtype, 2)).read(pa.table({"a": column, "b": [1, 1]}))
        assert together.errors == {1: said} and together.arrays[0].tolist() == [[1, 1], [0, 0]]


# --- images ---


def decoded(images: list[bytes | None], *shape: int, **image: Any) -> tuple[np.ndarray[Any, Any], dict[int, str]]:
    made = features(tensor_signature(*shape), image=image)
    table = pa.table({"_row_id": [str(i) for i in range(len(images))], "bytes": pa.array(images, pa.binary())})
    assert made.needs(table.schema) == ["bytes"]
    inputs = made.read(table)
    return inputs.arrays[0], inputs.errors


GREY = np.arange(12).reshape(3, 4) * 20
COLOUR = np.stack([GREY, GREY + 1, GREY + 2], axis=2)


def test_pixels_stand_where_the_model_expects_them() -> None:
    array, errors = decoded([png(COLOUR)], 3, 3, 4)
    assert errors == {} and array.shape == (1, 3, 3, 4) and array.dtype == np.float32
    assert np.array_equal(array[0], (COLOUR.transpose(2, 0, 1) / np.float32(255)).astype(np.float32))
    flat, _ = decoded([png(GREY)], 3, 4)
    assert np.array_equal(flat[0], GREY.astype(np.float32) / np.float32(255))


def test_colours_become_grey_and_grey_colours_as_the_model_takes_them() -> None:
    assert decoded([png(GREY)], 3, 3, 4)[0].shape == (1, 3, 3, 4)
    assert decoded([png(COLOUR)], 1, 3, 4)[0].shape == (1, 1, 3, 4)


def test_mean_and_deviation_are_applied_after_the_division() -> None:
    array, _ = decoded([png(COLOUR)], 3, 3, 4, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.5])
    plain, _ = decoded([png(COLOUR)], 3, 3, 4)
    assert np.allclose(array[0, 1], (plain[0, 1] - 0.4) / 0.2)


def test_another_size_fails_its_row_unless_the_trainer_allowed_to_resize() -> None:
    big = png(COLOUR, size=(40, 30))
    array, errors = decoded([big, png(COLOUR)], 3, 3, 4)
    assert errors == {0: "bad_image: 40 × 30 pixels, the model takes 4 × 3"}
    assert array[0].max() == 0 and array[1].max() > 0
    array, errors = decoded([big], 3, 3, 4, resize=True)
    assert errors == {} and array[0].max() > 0


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    summed = [(kind + body, len(body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk, size in summed
    )


def jpeg(pixels: np.ndarray[Any, Any]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(sink, "jpeg")
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [None, b"", b"GIF89a", b"\x00" * 100, png(COLOUR)[:48], jpeg(np.tile(COLOUR, (20, 20, 1)))[:200], b"<svg/>"],
    ids=["null", "empty", "header only", "zeros", "cut png", "cut jpeg", "svg"],
)
def test_what_is_no_whole_image_fails_its_row_with_a_stable_reason(data: bytes | None) -> None:
    first, again = decoded([data, png(COLOUR)], 3, 3, 4)[1], decoded([data, png(COLOUR)], 3, 3, 4)[1]
    assert first == again and list(first) == [0]
    assert first[0].startswith("bad_image: ") and "0x7" not in first[0]


def test_a_bomb_is_refused_by_its_header() -> None:
    sink = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(sink, "png")
    array, errors = decoded([sink.getvalue()], 3, 3, 4, resize=True)
    assert "400000000 pixels" in errors[0] or "20000 × 20000" in errors[0]
    assert array.max() == 0


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_of_the_models_own_size_and_mode_has_pillows_pixels(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, whole, images = {1: "L", 3: "RGB", 4: "RGBA"}[channels], random.Random(2), []
    for level in (0, 1, 6, 9):
        sink = io.BytesIO()
        Image.frombytes(mode, (5, 7), whole.randbytes(35 * channels)).save(sink, "png", compress_level=level)
        images.append(sink.getvalue())
    expected = [np.asarray(Image.open(io.BytesIO(data)), np.float32).reshape(7, 5, channels) / 255 for data in images]

    def none(*_: object) -> None:
        raise AssertionError("left to Pillow")

    monkeypatch.setattr("PIL.Image.open", none)
    array, errors = decoded(list(images), channels, 7, 5)
    assert errors == {} and np.array_equal(array, np.stack(expected).transpose(0, 3, 1, 2))


def test_what_png_files_hold_beside_their_pixels_changes_none() -> None:
    """Chunks of every kind, in any order, cut and damaged, with right checksums: both decoders' pixels, where both
    see any; each file that Pillow reads is read."""
    chance, mutants = random.Random(7), []
    others = [
        (b"tRNS", b"\0\1\0\2\0\3"),
        (b"PLTE", b"123" * 3),
        (b"gAMA", b"\0\0\xb1\x8f"),
        (b"acTL", b"\0\0\0\1\0\0\0\0"),
    ]
    others += [(b"iCCP", b"a\0\0no"), (b"zTXt", b"a\0\0no"), (b"eXIf", b"II*\0"), (b"IDAT", b""), (b"zzZz", b"own")]
    for _ in range(800):
        chunks = png_chunks(png(np.frombuffer(chance.randbytes(36), np.uint8).reshape(3, 4, 3)))
        for _ in range(chance.choice((1, 1, 2))):
            at, what = chance.randrange(1, len(chunks)), chance.randrange(4)
            kind, body = chunks[at]
            if what == 0:
                chunks[at] = (kind, body[: chance.randrange(len(body) + 1)])
            elif what == 1:
                chunks.insert(at, chance.choice(others + chunks[1:]))
            elif what == 2 and body:
                spot = chance.randrange(len(body))
                chunks[at] = (kind, body[:spot] + chance.randbytes(1) + body[spot + 1 :])
            else:
                chunks[1:] = chance.sample(chunks[1:], len(chunks) - 1)
        mutants.append(png_file(chunks))
    array, errors = decoded(list(mutants), 3, 3, 4)
    both = 0
    for row, data in enumerate(mutants):
        try:
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32) / 255
        except Exception:
            continue
        assert row not in errors and np.array_equal(array[row], pixels.transpose(2, 0, 1)), data
        both += 1
    assert 100 < both < 700 and len(errors) > 50


def test_mutated_images_are_pixels_or_row_errors_within_bounds() -> None:
    """In a process that may take one gigabyte more: six formats, each image a little wrong, decoded twice."""
    chance = random.Random(5)
    images: list[bytes | None] = []
    for number in range(600):
        sink, kind = io.BytesIO(), ("png", "jpeg", "gif", "webp", "bmp", "tiff")[number % 6]
        Image.frombytes("RGB", (16, 16), chance.randbytes(768)).save(sink, kind)
        data = bytearray(sink.getvalue())
        for _ in range(chance.choice((1, 2, 8))):
            at = chance.randrange(min(len(data), chance.choice((64, len(data)))))
            end = at + chance.choice((0, 1, 1, 20))
            data[at:end] = chance.choice((b"", b"\xff", b"\x00\x7f", chance.randbytes(4)))
        images.append(bytes(data))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
            (array, errors), (again, same) = (decoded(images, 3, 16, 16, resize=True) for _ in range(2))
            assert errors == same and np.array_equal(array, again)
            assert 100 < len(errors) < 500
            assert not any("Memory" in why or " at 0x" in why for why in errors.values())
            assert array.min() >= 0 and array.max() <= 1
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
