"""A source whose payloads are Avro, Protobuf, text or bytes, as a source of typed columns.

Invariants: blocks are cut before they are decoded, so they depend on the rows alone, and a retry gives the same ones;
every row of the inner source comes out once, under its own id, with its values or with ``_fault`` and its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Protocol, cast

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ingest.block import cut
from airflow_ai_provider.core.ingest.contract import FAULT, PAYLOAD, Source
from airflow_ai_provider.core.ingest.encoded.plain import PlainDecoder
from airflow_ai_provider.core.ingest.encoded.registry import Schemas
from airflow_ai_provider.core.ingest.encoded.wire import Payloads


class Block(Protocol):
    """One block of payloads, decoded: a dataclass with these."""

    @property
    def faults(self) -> Mapping[int, str]:
        """Position → why that payload is not a row."""

    def beside(self, table: pa.Table) -> pa.Table:
        """Put the values and ``_fault`` beside the rows that the payloads came with."""


class PayloadDecoder(Protocol):
    """Decodes the blocks of one batch."""

    @property
    def facts(self) -> Sequence[Mapping[str, Any]]:
        """The schemas that rows were decoded with."""

    def decode(self, payloads: Payloads) -> Block:
        """Decode one block; raises RegistryUnavailableError when a schema cannot be had."""


class SourceOver:
    """Stand before another source: its rows are this one's business, all else is its own.

    :param inner: the source of raw rows (``_payload``).
    """

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.name, self.key = inner.name, inner.key

    def identity(self) -> str:
        return self._inner.identity()

    def plan(
        self,
        position: Mapping[str, int],
        taken: Mapping[str, str],
        window: tuple[datetime, datetime] | None,
        row_limit: int | None,
    ) -> Span:
        return self._inner.plan(position, taken, window, row_limit)

    def commit(self, span: Span) -> None:
        self._inner.commit(span)

    def close(self) -> None:
        self._inner.close()


class EncodedSource(SourceOver):
    """Decode what another source reads.

    :param inner: the source of raw rows (``_payload``).
    :param open_decoder: makes the decoder of one read: what columns a batch has is decided by its own rows.
    """

    format = "columns"

    def __init__(self, inner: Source, open_decoder: Callable[[], PayloadDecoder]) -> None:
        super().__init__(inner)
        self.open_decoder = open_decoder
        self._decoders: list[PayloadDecoder] = []

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says about what was read: ids, subjects and versions of its schemas."""
        found = {schema["id"]: schema for decoder in self._decoders for schema in decoder.facts}
        return {"schemas": [found[number] for number in sorted(found)]} if found else {}

    def read(self, span: Span, mark: Callable[[pa.Table], pa.Table] | None = None) -> Iterator[pa.Table]:
        """Yield the span's rows, decoded: their own columns, ``_schema_id`` and ``_fault`` beside what came.

        :param mark: puts ``_fault`` beside a block's rows that must not be decoded; None: all are decoded.
        :raises RegistryUnavailableError: when a schema cannot be had; a retry reads the same span.
        """
        decoder = self.open_decoder()  # this read's own: another may begin before it ends
        self._decoders.append(decoder)
        for block in cut(self._inner.read(span)):
            yield _decode(decoder, mark(block) if mark else block)


def open_encoded(
    inner: Source, format: str, schemas: Schemas, reader_schema: str | None = None, columns: Sequence[str] = ()
) -> EncodedSource:
    """Read another source's payloads as ``avro`` or ``protobuf``.

    :param schemas: where schemas come from; asked when rows are read.
    :param reader_schema: schema to read all rows by.
    :param columns: columns that the expectations declare; a schema with none of them is rejected.
    :raises SpecError: when the reader schema cannot be used; a retry does not help.
    :raises MissingExtraError: when Protobuf is asked for and protoc is not installed; a retry does not help.
    """

    open_decoder = partial(_open_decoder, format, schemas, reader_schema, columns)  # it can be pickled
    open_decoder()  # a reader schema with a fault fails before anything is claimed
    return EncodedSource(inner, open_decoder)


def open_plain(inner: Source, format: str) -> EncodedSource:
    """Read another source's payloads as ``text`` or ``bytes``, each a row with the column ``value``."""
    return EncodedSource(inner, partial(PlainDecoder, format))


def _open_decoder(format: str, schemas: Schemas, reader_schema: str | None, columns: Sequence[str]) -> PayloadDecoder:
    if format == "avro":
        from airflow_ai_provider.core.ingest.encoded.avro.decoder import AvroDecoder

        return AvroDecoder(schemas, reader_schema, columns=columns)
    from airflow_ai_provider.core.ingest.encoded.protobuf.decoder import ProtobufDecoder

    return ProtobufDecoder(schemas, reader_schema, columns=columns)


def _decode(decoder: PayloadDecoder, block: pa.Table) -> pa.Table:
    if FAULT not in block.column_names:
        return decoder.decode(block[PAYLOAD]).beside(block)
    known = block[FAULT].to_pylist()
    spared = pc.if_else(pc.is_null(block[FAULT]), block[PAYLOAD], pa.scalar(None, pa.binary()))
    decoded = decoder.decode(spared)
    faults = {**decoded.faults, **{at: fault for at, fault in enumerate(known) if fault}}
    return replace(cast(Any, decoded), faults=faults).beside(block.drop_columns([FAULT]))
