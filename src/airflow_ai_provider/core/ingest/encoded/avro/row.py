"""Read one Avro body, byte by byte: slow, and the judge of what is right.

Stricter than the specification's encoders ever write, and stricter than the usual readers:

- A number is written in as few bytes as it needs and fits its type (``int`` 32 bits, ``long`` 64).
- A union's, enum's branch is one that exists; -1 is none. A boolean is 0 or 1.
- A length is not negative and not more than the bytes that are left: nothing is allocated before that is known.
- Text is UTF-8 (no surrogates, nothing over-long); a ``uuid`` looks like one; a map names each key once.
- A date or timestamp lies in the years 1 to 9999, a time within a day, a decimal within its precision.
- Records, lists, maps and unions nest no deeper than the limit; things of no size come at most
  :data:`MAX_EMPTY_ITEMS` at a time.
- The body ends where the value ends.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from airflow_ai_provider.core.ingest.encoded.avro.schema import Array, Enum, Leaf, Map, Node, Record, Union, is_null
from airflow_ai_provider.core.ingest.encoded.avro.values import UUID, bounds, unscaled_limit

MAX_EMPTY_ITEMS = 10_000
_UUID = re.compile(UUID)
_FLOAT, _DOUBLE = struct.Struct("<f"), struct.Struct("<d")


class BodyFaultError(ValueError):
    """A body is not a value of its schema."""


def read_body(record: Record, body: bytes, max_depth: int) -> tuple[Any, ...]:
    """Read the one value that a body is.

    :return: the fields' plain values (:mod:`.avro_values`).
    :raises BodyFaultError: naming the field and the fault.
    """
    reader = _Reader(body, max_depth)
    values: tuple[Any, ...] = reader.read_record(record)
    if reader.at != len(body):
        raise BodyFaultError(f"{len(body) - reader.at} bytes are left after the last field")
    return values


class _Reader:
    def __init__(self, body: bytes, max_depth: int) -> None:
        self._body, self.at = body, 0
        self._left = max_depth
        self._empty = 0
        self._leaves: dict[str, Callable[[Leaf], Any]] = {
            "null": lambda _: None,
            "boolean": self._boolean,
            "int": self._whole,
            "long": self._whole,
            "float": lambda _: _FLOAT.unpack(self._take(4))[0],
            "double": lambda _: _DOUBLE.unpack(self._take(8))[0],
            "bytes": self._bytes,
            "string": self._text,
            "fixed": lambda leaf: self._checked(leaf, self._take(leaf.size)),
        }

    def read(self, node: Node) -> Any:
        if isinstance(node, Leaf):
            return self._leaves[node.kind](node)
        if isinstance(node, Enum):
            return node.symbols[self._index(len(node.symbols), "symbols")]
        if self._left <= 0:
            raise BodyFaultError(": nested too deeply")
        self._left -= 1
        try:
            if isinstance(node, Record):
                return self.read_record(node)
            if isinstance(node, Union):
                return self._union(node)
            return self._list(node) if isinstance(node, Array) else self._map(node)
        finally:
            self._left += 1

    def read_record(self, node: Record) -> tuple[Any, ...]:
        values = []
        for field in node.fields:
            try:
                values.append(self.read(field.node))
            except BodyFaultError as error:
                raise BodyFaultError(_within(field.name, str(error))) from None
        return tuple(values)

    def _union(self, node: Union) -> Any:
        index = self._index(len(node.branches), "types")
        branch = node.branches[index]
        value = self.read(branch)
        if is_null(branch) or len(node.valued) == 1:
            return value
        return (sum(not is_null(b) for b in node.branches[:index]), value)

    def _list(self, node: Array) -> list[Any]:
        items: list[Any] = []
        self._blocks(lambda: items.append(self.read(node.items)))
        return items

    def _map(self, node: Map) -> list[tuple[str, Any]]:
        items: dict[str, Any] = {}

        def read_pair() -> None:
            key = self._text(Leaf("string"))
            if key in items:
                raise BodyFaultError(f": a map has the key {key[:40]!r} twice")
            items[key] = self.read(node.values)

        self._blocks(read_pair)
        return list(items.items())

    def _blocks(self, read_item: Callable[[], None]) -> None:
        while count := self._varint(64):
            end = None
            if count < 0:
                count = -count
                size = self._varint(64)
                end = self.at + size
                if size < 0 or end > len(self._body):
                    raise BodyFaultError(f": a block of {size} bytes, {len(self._body) - self.at} are left")
            for _ in range(count):
                before = self.at
                read_item()
                if self.at == before:
                    self._empty += 1
                    if self._empty > MAX_EMPTY_ITEMS:
                        raise BodyFaultError(f": more than {MAX_EMPTY_ITEMS} items of no size")
            if end is not None and self.at != end:
                raise BodyFaultError(f": a block ends {self.at - end:+} bytes from where it says")

    def _boolean(self, _: Leaf) -> bool:
        byte = self._take(1)[0]
        if byte > 1:
            raise BodyFaultError(f": byte {byte} is no boolean")
        return byte == 1

    def _whole(self, leaf: Leaf) -> int:
        value = self._varint(32 if leaf.kind == "int" else 64)
        least, greatest = bounds(leaf)
        if not least <= value <= greatest:
            raise BodyFaultError(f": {value} is no {leaf.logical or leaf.kind}")
        return value

    def _bytes(self, leaf: Leaf) -> bytes:
        return self._checked(leaf, self._sized())

    def _text(self, leaf: Leaf) -> str:
        try:
            text = self._sized().decode()
        except UnicodeDecodeError as error:
            raise BodyFaultError(f": text is not UTF-8 ({error.reason} at byte {error.start})") from None
        if leaf.logical == "uuid" and not _UUID.fullmatch(text):
            raise BodyFaultError(f": {text[:40]!r} is no uuid")
        return text

    def _checked(self, leaf: Leaf, value: bytes) -> bytes:
        if leaf.logical == "decimal":
            unscaled = int.from_bytes(value[:64], "big", signed=True)
            if not 0 < len(value) <= 64 or abs(unscaled) > unscaled_limit(leaf):
                raise BodyFaultError(f": {len(value)} bytes are no decimal({leaf.precision},{leaf.scale})")
        return value

    def _index(self, count: int, what: str) -> int:
        index = self._varint(64)
        if not 0 <= index < count:
            raise BodyFaultError(f": number {index} of {count} {what}")
        return index

    def _sized(self) -> bytes:
        size = self._varint(64)
        if size < 0:
            raise BodyFaultError(f": length {size}")
        return self._take(size)

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self._body):
            raise BodyFaultError(f": {size} bytes, {len(self._body) - self.at} are left")
        value = self._body[self.at : end]
        self.at = end
        return value

    def _varint(self, bits: int) -> int:
        body, at = self._body, self.at
        value = shift = 0
        while True:
            if at >= len(body):
                raise BodyFaultError(": a number is cut")
            byte = body[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 63:
                raise BodyFaultError(": a number of more than ten bytes")
        if byte == 0 and shift:
            raise BodyFaultError(": a number with needless bytes")
        if value >> bits:
            raise BodyFaultError(f": a number of more than {bits} bits")
        self.at = at
        return (value >> 1) ^ -(value & 1)


def _within(name: str, text: str) -> str:
    """Name the field in front of the fault; of a long path only its ends."""
    path, colon, fault = text.partition(":")
    path = f"{name}.{path}" if path else name
    return (path if len(path) <= 120 else f"{path[:60]}…{path[-59:]}") + colon + fault
