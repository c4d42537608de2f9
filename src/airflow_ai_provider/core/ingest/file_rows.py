"""Bytes of one file → tables of rows, one function per format.

Decided once:

- JSON Lines: a line is a row, numbered from 0; a line of nothing but white space is none, and its number is left out.
- A line of more than 64 MiB, in JSON Lines or CSV, is a row at fault with its first 64 MiB.
- CSV: RFC 4180 with a header, UTF-8 (a byte order mark before the header is dropped); a record is a row, numbered
  from 0 after the header; empty lines are none. A record with too few or too many cells, a stray quote or other bytes
  is a row at fault with its own bytes. A header has 10,000 columns at the most.
- Parquet: rows as stored. A file or row group that cannot be read whole is one row at fault, saying which: checksums of
  pages are verified where there are any, texts must be UTF-8, the number of rows is what the file says, no more than
  10,000 columns, no name twice.
- Image: a file is a row: ``path``, ``bytes``, ``size``, ``format`` (png, jpeg, gif, webp, bmp, tiff, by its first
  bytes); another file is a row at fault with its bytes, and one of more than 256 MiB is one without them.
- A folder ``name=value`` below the source's own (Hive's way) is a column of text, with ``%20`` and the like read and
  ``__HIVE_DEFAULT_PARTITION__`` as null.
- A column whose name begins with an underscore goes to ``_extra``: such names are the provider's own.

Each function feeds the bytes it reads to ``seen``, so that the caller can tell whether they are those of the plan.
"""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from airflow_ai_provider.core.batch import ROW_ID
from airflow_ai_provider.core.ingest.contract import EXTRA, FAULT, PAYLOAD
from airflow_ai_provider.core.ingest.json_rows import MAX_PAYLOAD, is_column
from airflow_ai_provider.core.ingest.typed_rows import row_json
from airflow_ai_provider.errors import SourceError

CHUNK = 4 * 1024 * 1024
_ROWS, _BYTES = 20_000, 32 * 1024 * 1024
_BROKEN = (pa.ArrowException, OSError, ValueError)
_MAX_COLUMNS = 10_000
_MAX_LINE = 64 * 1024 * 1024
_MAX_IMAGE = 256 * 1024 * 1024
_HELD = (
    256 * 1024 * 1024
)  # of a row group in memory; a larger one is read twice, the first time only to see that it can
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # Hive's word for null
_BOM = b"\xef\xbb\xbf"
Seen = Callable[[bytes], Any]


class RowNames:
    """Names the rows of one file: its path and content, and the row's number.

    :param path: relative to the source's folder.
    :param digest: SHA-256 of the file's bytes, with its ``sha256:``.
    """

    def __init__(self, path: str, digest: str) -> None:
        self.path, self._prefix = path, f"{path}~{digest[7:15]}/"

    def columns(self, numbers: list[int]) -> dict[str, pa.Array]:
        """Return ``_row_id``, ``_file`` and ``_row`` of some rows."""
        return {
            ROW_ID: pa.array([f"{self._prefix}{n}" for n in numbers], pa.string()),
            "_file": pa.array([self.path] * len(numbers), pa.string()),
            "_row": pa.array(numbers, pa.int64()),
        }

    def fault(self, number: int, reason: str, payload: bytes | None) -> pa.Table:
        """Return a table of one row at fault."""
        fault = {PAYLOAD: pa.array([payload], pa.binary()), FAULT: pa.array([reason], pa.string())}
        return pa.table({**self.columns([number]), **fault})


def read_jsonl(file: BinaryIO, names: RowNames, seen: Seen) -> Iterator[pa.Table]:
    """Yield the lines of a JSON Lines file as payloads."""
    numbers: list[int] = []
    payloads: list[bytes] = []
    size = 0
    for number, (line, _) in enumerate(_lines(file, seen)):  # one that was cut is too long for any decoder
        if line.isspace() or not line:
            continue
        numbers.append(number)
        payloads.append(line.removesuffix(b"\n"))
        size += len(line)
        if len(numbers) >= _ROWS or size >= _BYTES:
            yield pa.table({**names.columns(numbers), PAYLOAD: pa.array(payloads, pa.binary())})
            numbers, payloads, size = [], [], 0
    if numbers:
        yield pa.table({**names.columns(numbers), PAYLOAD: pa.array(payloads, pa.binary())})


def read_csv(file: BinaryIO, names: RowNames, seen: Seen) -> Iterator[pa.Table]:
    """Yield the records of a CSV file as columns of text.

    :raises SourceError: when the header cannot be one; a retry does not help.
    """
    records = _records(file, seen)
    first = next(records, None)
    if first is None:
        return
    header = _header(*first, names.path)
    rows: list[tuple[int, list[str] | None, bytes | None, str | None]] = []
    size = 0
    for number, (cells, raw, fault) in enumerate(records):
        if not cells and not fault:
            continue
        reason = fault or _misshapen(cells, len(header))
        rows.append((number, None, raw, reason) if reason else (number, cells, None, None))
        size += len(raw)
        if len(rows) >= _ROWS or size >= _BYTES:
            yield _csv_table(header, rows, names)
            rows, size = [], 0
    if rows:
        yield _csv_table(header, rows, names)


def read_parquet(file: BinaryIO, names: RowNames, seen: Seen) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file."""
    with tempfile.TemporaryFile() as copy:  # an error in reading it is then the content's, never the network's
        while chunk := file.read(CHUNK):
            seen(chunk)
            copy.write(chunk)
        copy.seek(0)
        yield from _parquet_tables(copy, names)


def _parquet_tables(file: IO[bytes], names: RowNames) -> Iterator[pa.Table]:
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        counts = _row_counts(parquet)
    except MemoryError:  # Arrow's is one of its errors, too, and says nothing about the file
        raise
    except _BROKEN as error:
        yield names.fault(0, f"broken_parquet: {_first_line(error)}", None)
        return
    first = 0
    for group, count in enumerate(counts):
        try:
            batches = _whole_group(parquet, group, count)
        except MemoryError:
            raise
        except _BROKEN as error:
            yield names.fault(first, f"broken_parquet: row group {group}, {count} rows: {_first_line(error)}", None)
            batches = iter(())
        at = first
        for batch in batches:
            table = _plain(pa.Table.from_batches([batch]))
            own = names.columns(list(range(at, at + table.num_rows)))
            yield pa.table({**own, **{n: table[n] for n in table.column_names}})
            at += table.num_rows
        first += count


def _row_counts(parquet: pq.ParquetFile) -> list[int]:
    """Rows of each row group, once the file's own account of itself adds up."""
    columns, told = parquet.schema_arrow.names, parquet.metadata
    if len(columns) > _MAX_COLUMNS:
        raise ValueError(f"it has {len(columns)} columns; {_MAX_COLUMNS} are read at the most")
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise ValueError(f"it names {twice[:5]} twice")
    counts = [told.row_group(group).num_rows for group in range(told.num_row_groups)]
    if any(count < 0 for count in counts) or sum(counts) != told.num_rows:
        raise ValueError(f"it says that it has {told.num_rows} rows, and that its row groups have {counts[:5]}")
    return counts


def _whole_group(parquet: pq.ParquetFile, group: int, count: int) -> Iterator[pa.RecordBatch]:
    """Read a row group to its end before its first row is handed on: of a broken one none is believed."""
    held: list[pa.RecordBatch] | None = []
    rows = size = 0
    for batch in parquet.iter_batches(_ROWS, row_groups=[group]):
        batch.validate(full=True)  # Arrow takes texts for UTF-8 unseen
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows > count:
            break
        held = [*held, batch] if held is not None and size <= _HELD else None
    if rows != count:
        raise ValueError(f"it holds {'more' if rows > count else f'only {rows}'}")
    return iter(held) if held is not None else parquet.iter_batches(_ROWS, row_groups=[group])


def read_image(file: BinaryIO, names: RowNames, seen: Seen) -> Iterator[pa.Table]:
    """Yield one row: the image."""
    size, pieces = 0, []
    while chunk := file.read(CHUNK):
        seen(chunk)
        size += len(chunk)
        if size <= _MAX_IMAGE:
            pieces.append(chunk)
    data = b"".join(pieces) if size <= _MAX_IMAGE else None
    kind = image_format(pieces[0]) if pieces else None
    fault = None if kind else f"broken_image: {size} bytes that begin with {(data or b'')[:8].hex()} are no known image"
    if data is None:
        fault = f"broken_image: {size} bytes; {_MAX_IMAGE} are read at the most"
    yield pa.table(
        {
            **names.columns([0]),
            "path": pa.array([names.path], pa.string()),
            "bytes": pa.array([data], pa.binary()),
            "size": pa.array([size], pa.int64()),
            "format": pa.array([kind], pa.string()),
            PAYLOAD: pa.array([data if fault else None], pa.binary()),
            FAULT: pa.array([fault], pa.string()),
        }
    )


def with_partitions(table: pa.Table, path: str) -> pa.Table:
    """Add the columns that folders such as ``day=2026-11-01`` stand for, as text; a column of the file's own wins."""
    for step in path.split("/")[:-1]:
        name, equals, text = step.partition("=")
        name = unquote(name)
        if not equals or not is_column(name) or name in table.column_names:
            continue
        value = None if text in ("", _NO_PARTITION) else unquote(text)
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def image_format(data: bytes) -> str | None:
    """Tell an image's format by its first bytes; whether it decodes is for the engine to see, row by row."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    signatures = (
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff", "jpeg"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"BM", "bmp"),
        (b"II*\x00", "tiff"),
        (b"MM\x00*", "tiff"),
    )
    return next((name for signature, name in signatures if data.startswith(signature)), None)


def _lines(file: BinaryIO, seen: Seen) -> Iterator[tuple[bytes, bool]]:
    """Yield lines with their newline, and whether that is all of it: of an endless one the beginning is kept.

    Only b"\\n" ends a line, for other separators may stand inside a JSON text.
    """
    rest, whole = b"", True
    while chunk := file.read(CHUNK):
        seen(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n", whole
            whole = True
        if len(rest) > _MAX_LINE:
            rest, whole = rest[:_MAX_LINE], False
    if rest:
        yield rest, whole


def _records(file: BinaryIO, seen: Seen) -> Iterator[tuple[list[str], bytes, str | None]]:
    """Yield cells, bytes and fault of each CSV record."""
    taken: list[bytes] = []
    cut: list[bool] = []

    def texts() -> Iterator[str]:
        for number, (line, whole) in enumerate(_lines(file, seen)):
            taken.append(line)
            cut.append(not whole)
            text = line.removeprefix(_BOM) if number == 0 else line
            yield text.decode("utf-8", "surrogateescape")

    # its default of 128 KiB would call a long text an error
    csv.field_size_limit(max(csv.field_size_limit(), MAX_PAYLOAD))
    reader = csv.reader(texts(), strict=True)
    while True:
        cells: list[str] = []
        fault = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"broken_csv: {error}"
        if any(cut):
            fault = f"broken_csv: a line of more than {_MAX_LINE} bytes"
        raw = b"".join(taken)
        taken.clear()
        cut.clear()
        yield cells, raw.removesuffix(b"\n").removesuffix(b"\r"), fault


def _header(cells: list[str], raw: bytes, fault: str | None, path: str) -> list[str]:
    twice = sorted(name for name, count in Counter(cells).items() if count > 1)[:5]
    many = f"names {len(cells)} columns; {_MAX_COLUMNS} are read at the most" if len(cells) > _MAX_COLUMNS else ""
    wrong = fault or many or (f"names {twice} twice" if twice else "") or ("leaves a name empty" if "" in cells else "")
    wrong = wrong or ("is not UTF-8" if _is_escaped(cells) else "")
    if wrong or not cells:
        raise SourceError(
            f"{path}: its first line cannot be the header of a CSV file: {wrong or 'it is empty'} ({raw[:80]!r}). "
            "Give each column one name of its own in the first line.",
            path=path,
        )
    return cells


def _misshapen(cells: list[str], count: int) -> str | None:
    if len(cells) != count:
        return f"broken_csv: {len(cells)} cells, the header has {count}"
    return "broken_csv: not UTF-8" if _is_escaped(cells) else None


def _is_escaped(cells: list[str]) -> bool:
    return any(not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell) for cell in cells)


def _csv_table(
    header: list[str], rows: list[tuple[int, list[str] | None, bytes | None, str | None]], names: RowNames
) -> pa.Table:
    blank: list[str] = [""] * len(header)
    columns = list(zip(*(cells if cells is not None else blank for _, cells, _, _ in rows), strict=True))
    cells = {
        name: pa.array([c or None for c in column], pa.string()) for name, column in zip(header, columns, strict=True)
    }
    table = pa.table(
        {
            **names.columns([number for number, *_ in rows]),
            PAYLOAD: pa.array([raw for _, _, raw, _ in rows], pa.binary()),
            FAULT: pa.array([fault for *_, fault in rows], pa.string()),
        }
    )
    shown = _plain(pa.table(cells))
    return pa.table({**{n: table[n] for n in table.column_names}, **{n: shown[n] for n in shown.column_names}})


def _plain(table: pa.Table) -> pa.Table:
    """Return plain columns: dictionaries unfolded, names of the provider's own gathered as JSON in ``_extra``."""
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    hidden = [n for n in table.column_names if not is_column(n)]
    if not hidden:
        return table
    texts = [row_json(row).decode() for row in table.select(hidden).to_pylist()]
    return table.drop_columns(hidden).append_column(EXTRA, pa.array(texts, pa.string()))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
