"""Rows as they came → typed columns, and a quarantine row with bytes and reason for each that does not fit.

Invariants: every row in is one row out, accepted or rejected, under its own id and in order; columns and types are
fixed by the declared schema and the first block that has a row that fits, and then hold for the whole batch.
What fits is decided in :mod:`.json_rows` (payloads) and :mod:`.typed_rows` (columns that have values already).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.column import flags, mask_of, positions
from airflow_ai_provider.core.ingest.contract import EXTRA, FAULT, ORIGIN, PAYLOAD, REASONS, STAGE
from airflow_ai_provider.core.ingest.json_rows import ARROW, JsonBlock, JsonRows, infer, is_column
from airflow_ai_provider.core.ingest.typed_rows import cast_text, cast_typed, infer_text, row_json
from airflow_ai_provider.errors import SpecError

_KIND = b"kind"
"""Under this a column's type by its name stands beside its Arrow type: ``json`` and ``string`` are the same there."""


@dataclass(frozen=True)
class Decoded:
    """One block, decoded.

    :param accepted: ``_row_id``, the author's columns, ``_extra``, origin columns, and ``_payload`` where there is one.
    :param rejected: quarantine rows (:func:`quarantine`).
    """

    accepted: pa.Table
    rejected: pa.Table


class RowDecoder:
    """Decode the blocks of one batch, all into the same columns.

    :param schema: column → ``int64``, ``float64``, ``string``, ``bool``, ``timestamp``, ``json``, or an empty text:
        the column exists, its type is found in the first block.
    :param format: ``json``, ``csv`` or ``columns``: what the source's tables hold.
    :raises SpecError: for an unknown type or a column name of the provider's own; a retry does not help.
    """

    def __init__(self, schema: Mapping[str, str], format: str) -> None:
        faults = [(n, f"type {t!r} is not one of {sorted(ARROW)}") for n, t in schema.items() if t and t not in ARROW]
        faults += [(n, "names that begin with _ are the provider's own") for n in schema if not is_column(n)]
        if faults:
            listed = "; ".join(f"{name}: {fault}" for name, fault in faults)
            raise SpecError(f"the row schema cannot be used: {listed}. Change the expectations.", faults=faults)
        self._schema, self._format = dict(schema), format
        self._rows: JsonRows | None = None
        self._types: dict[str, pa.DataType] | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the batch, as far as they are fixed: name → type."""
        if self._rows is not None:
            return dict(self._rows.columns)
        return {name: str(type_) for name, type_ in (self._types or {}).items()}

    @property
    def head(self) -> pa.Schema | None:
        """The batch's columns once rows have fixed them, for :meth:`fix`."""
        if self._rows is not None:
            return pa.schema([pa.field(n, ARROW[k], metadata={_KIND: k}) for n, k in self._rows.columns.items()])
        return pa.schema(self._types) if self._types is not None else None

    def fix(self, head: pa.Schema) -> None:
        """Take over the columns that another decoder of the same batch has found."""
        if self._format == "json":
            self._rows = JsonRows({field.name: field.metadata[_KIND].decode() for field in head})
        else:
            self._types = dict(zip(head.names, head.types, strict=True))

    def decode(self, table: pa.Table, *, with_payload: bool = True) -> Decoded:
        """Decode one block: :meth:`begin`, and all that is left."""
        return self.begin(table, with_payload=with_payload)()

    def begin(self, table: pa.Table, *, with_payload: bool = True) -> Callable[[], Decoded]:
        """Read one block's values; blocks come in their order.

        :param with_payload: False leaves the payloads out of ``accepted``: to copy them costs more than to look up
            those of the few rows that need theirs.
        :return: puts the block's rows together; may run on another thread while the next block is read, those of all
            blocks in their order.
        """
        if self._format != "json":
            return partial(self._decode_columns, table, with_payload)
        if FAULT not in table.column_names:
            return self._begin_json(table, with_payload)
        fit = table.filter(pc.is_null(table[FAULT])).drop_columns([FAULT])
        return partial(_with_spared, self._begin_json(fit, with_payload), table)

    def _begin_json(self, table: pa.Table, with_payload: bool) -> Callable[[], Decoded]:
        payloads = table[PAYLOAD]
        rows, block = (self._rows, self._rows.decode(payloads)) if self._rows else self._first(payloads)
        if len(block.extras):
            self._rows = rows
        return partial(_together, table, block, with_payload)

    def _first(self, payloads: pa.ChunkedArray) -> tuple[JsonRows, JsonBlock]:
        """Decode the first block, and again when that shows fields that nobody declared."""
        declared = {name: kind or "json" for name, kind in self._schema.items()}
        if "" not in self._schema.values():
            rows = JsonRows(declared)
            block = rows.decode(payloads)
            if block.extras.null_count == len(block.extras):
                return rows, block
        named = {name: kind for name, kind in self._schema.items() if kind}
        found = infer(payloads.to_pylist(), named)
        rows = JsonRows({**declared, **found} if self._schema else found)
        return rows, rows.decode(payloads)

    def _decode_columns(self, table: pa.Table, with_payload: bool) -> Decoded:
        read = table if with_payload or PAYLOAD not in table.column_names else table.drop_columns([PAYLOAD])
        at = np.arange(table.num_rows)
        unread = table.slice(0, 0)
        if FAULT in table.column_names:
            is_read = pc.is_null(table[FAULT])
            read, at = read.filter(is_read), np.flatnonzero(mask_of(is_read))
            # a row that was not read has no values: without a payload it is a tombstone, not an object of nulls
            own = [n for n in table.column_names if not is_column(n) or n == "bytes"]
            unread = table.select(own).filter(pc.invert(is_read))
        if read.num_rows and self._types is None:
            self._types = self._find_types(read)
        columns, faults = self._conform(read)
        bad = sorted(faults)
        rejected = [quarantine(unread, "decode", [[text] for text in _texts(unread, FAULT)])]
        rejected.append(quarantine(table.take(positions(at[bad])), "decode", [faults[i] for i in bad]))
        accepted = pa.table(columns)
        if bad:
            fits = np.ones(read.num_rows, np.bool_)
            fits[bad] = False
            accepted = accepted.filter(flags(fits))
        return Decoded(accepted, pa.concat_tables([r for r in rejected if r.num_rows] or rejected[:1]))

    def _find_types(self, table: pa.Table) -> dict[str, pa.DataType]:
        types: dict[str, pa.DataType] = {}
        for name in [*self._schema, *(n for n in table.column_names if is_column(n) and n not in self._schema)]:
            kind = self._schema.get(name)
            if not kind and name in table.column_names:
                found = infer_text(table[name]) if self._format == "csv" else None
                types[name] = ARROW[found] if found else table.schema.field(name).type
            else:
                types[name] = ARROW[kind or "string"]
        return types

    def _conform(self, table: pa.Table) -> tuple[dict[str, pa.Array | pa.ChunkedArray], dict[int, list[str]]]:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {ROW_ID: table[ROW_ID]}
        faults: dict[int, list[str]] = {}
        for name, target in (self._types or {}).items():
            if name not in table.column_names:
                columns[name] = pa.nulls(table.num_rows, target)
                continue
            columns[name], bad = self._cast(table[name], name, target)
            for i in bad:
                value = repr(table[name][i].as_py())
                shown = value if len(value) <= 80 else value[:80] + "…"
                faults.setdefault(i, []).append(f"wrong_type: {name}={shown} is not {target}")
        columns[EXTRA] = self._extras(table)
        columns.update({name: table[name] for name in ORIGIN if name in table.column_names})
        if PAYLOAD in table.column_names:
            columns[PAYLOAD] = table[PAYLOAD]
        return columns, faults

    def _cast(self, column: pa.ChunkedArray, name: str, target: pa.DataType) -> tuple[pa.Array, list[int]]:
        if self._format == "csv":
            kind = next(kind for kind, type_ in ARROW.items() if type_ == target)
            return cast_text(column, kind)
        return cast_typed(column, target, self._schema.get(name) or None)

    def _extras(self, table: pa.Table) -> pa.Array:
        unknown = [n for n in table.column_names if is_column(n) and n not in (self._types or {})]
        hidden = table[EXTRA] if EXTRA in table.column_names else pa.nulls(table.num_rows, pa.string())
        if not unknown:
            return hidden
        rows = zip(table.select(unknown).to_pylist(), hidden.to_pylist(), strict=True)
        return pa.array([row_json({**row, **json.loads(more or "{}")}).decode() for row, more in rows], pa.string())


def _together(table: pa.Table, block: JsonBlock, with_payload: bool) -> Decoded:
    """Put the values of JSON rows beside what they came with."""
    kept = table if with_payload else table.drop_columns([PAYLOAD])
    if block.faults:
        fits = np.ones(table.num_rows, np.bool_)
        fits[list(block.faults)] = False
        kept = kept.filter(flags(fits))
    accepted = pa.table(
        {
            ROW_ID: kept[ROW_ID],
            **block.columns,
            **_beside(kept, block.columns),
            EXTRA: block.extras,
            **{name: kept[name] for name in (*ORIGIN, PAYLOAD) if name in kept.column_names},
        }
    )
    rejected = table.take(pa.array(block.faults, pa.int64()))
    return Decoded(accepted, quarantine(rejected, "decode", list(block.faults.values())))


def _with_spared(decoded: Callable[[], Decoded], table: pa.Table) -> Decoded:
    """Put the rows that were at fault before they were decoded into quarantine, beside those of the block itself."""
    own, spared = decoded(), table.filter(pc.is_valid(table[FAULT]))
    rejected = quarantine(spared, "decode", [[text] for text in _texts(spared, FAULT)])
    return Decoded(own.accepted, pa.concat_tables([own.rejected, rejected]))


def _beside(table: pa.Table, columns: Mapping[str, pa.Array]) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Columns of text that the source knows beside the payload (a file's partition), where no payload has the field."""
    found: dict[str, pa.Array | pa.ChunkedArray] = {}
    for name in (n for n in table.column_names if is_column(n)):
        own = columns.get(name)
        if own is None:
            found[name] = table[name]
        elif own.null_count == len(own):
            kind = next((kind for kind, type_ in ARROW.items() if type_ == own.type), "string")
            found[name] = cast_text(table[name], kind)[0]
    return found


def quarantine(table: pa.Table, stage: str, reasons: Sequence[Sequence[str]]) -> pa.Table:
    """Shape rows for quarantine: id, origin, bytes, stage and reasons.

    A row without bytes of its own gets its ``bytes`` column (an image), else its columns as a JSON object.

    :param stage: ``decode`` or ``validate``.
    :param reasons: per row, ``<code>: <detail>``.
    """
    origin = {name: table[name] for name in ORIGIN if name in table.column_names}
    return pa.table(
        {
            ROW_ID: table[ROW_ID].cast(pa.string()),
            **origin,
            PAYLOAD: _payloads(table),
            STAGE: pa.array([stage] * table.num_rows, pa.string()),
            REASONS: pa.array([list(r) for r in reasons], pa.list_(pa.string())),
        }
    )


def _payloads(table: pa.Table) -> pa.Array | pa.ChunkedArray:
    own = table[PAYLOAD].cast(pa.binary()) if PAYLOAD in table.column_names else pa.nulls(table.num_rows, pa.binary())
    names = [n for n in table.column_names if is_column(n)]
    if not names or own.null_count == 0:  # raw rows: a tombstone stays null
        return own
    if "bytes" in names:
        return pc.coalesce(own, table["bytes"].cast(pa.binary()))
    made = pa.array([row_json(row) for row in table.select(names).to_pylist()], pa.binary())
    return pc.coalesce(own, made)


def _texts(table: pa.Table, name: str) -> list[str]:
    return table[name].to_pylist() if name in table.column_names else []
