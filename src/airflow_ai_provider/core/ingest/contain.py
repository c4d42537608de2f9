"""A payload or file that ends the process of one try must not end every try's: the next one quarantines it.

Native parsers read what strangers sent. When one crashes, the task dies without a word and its retry would die at the
same row, for ever. So a marker lies in the batch's folder while rows are read; who finds one knows that a try died
there (for whatever reason), and has each block decoded in another process before it decodes it itself.

Invariants: a try without a marker pays two small files and nothing else; what can raise takes its marker with it; a row
is rejected only if it alone ends a process; rows, order and blocks are those of an undisturbed try.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import Span
from airflow_ai_provider.core.ingest.block import cut
from airflow_ai_provider.core.ingest.contract import FAULT, PAYLOAD, Source
from airflow_ai_provider.core.ingest.encoded.source import EncodedSource
from airflow_ai_provider.core.ingest.files import FileReader
from airflow_ai_provider.core.ingest.taster import decode_encoded, decode_files, decode_json
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SourceUnavailableError

log = logging.getLogger(__name__)

MARKER = "reading.aside"
_ROW_S, _FILE_S = 0.002, 600.0
"""How long a payload of a block, or a file, may take: a hundred times what they need."""
_FILE_MEMORY = 8 << 30
Read = Callable[[Span], Iterator[pa.Table]]


@contextmanager
def contained(source: Source, schema: Mapping[str, str], store: Store, folder: str) -> Iterator[Read]:
    """Yield how to read the source: as it does itself, or, when an earlier try died at it, with care.

    :param schema: the row schema, as decoding gets it.
    :param folder: of the batch, under the store's root.
    """
    decode = _decoding(source, schema)
    if decode is None:  # its rows are values already
        yield source.read
        return
    row_s = _FILE_S if isinstance(source, FileReader) and source.format != "json" else _ROW_S
    died = store.read_bytes(f"{folder}/{MARKER}") is not None
    store.write_bytes(f"{folder}/{MARKER}", b"")
    try:
        if died:
            log.warning(
                "an earlier try of %s died while it read rows, and could not say why. In case a payload ended it, this "
                "one decodes every block in another process first, which takes longer.",
                folder,
            )
            with Taster(decode, row_s) as taster:
                yield partial(_read_tasted, source, taster)
        else:
            yield source.read
    finally:
        with suppress(SourceUnavailableError):  # a marker that stays costs the next try time, no more
            store.remove(f"{folder}/{MARKER}")


class Taster:
    """Find the payloads that end a process, in a process of its own (:mod:`.taster`).

    :param decode: picklable; what is done with a block of payloads.
    :param row_s: how long a payload of a block may take, on the average.
    """

    def __init__(self, decode: Callable[[pa.Array], object], row_s: float = _ROW_S) -> None:
        # not multiprocessing: it would import this process's main module, which is Airflow, and fork its threads
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "airflow_ai_provider.core.ingest.taster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        self._send(pickle.dumps((row_s, decode)))

    def __enter__(self) -> Taster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def mark(self, block: pa.Table) -> pa.Table:
        """Put ``_fault`` beside the rows: why a payload must not be decoded here; null for all others."""
        deadly = self._find_deadly(block.select([PAYLOAD]))
        faults: list[str | None] = [None] * block.num_rows
        for at, end in deadly.items():
            faults[at] = f"decoder_crashed: a process that decoded nothing else did not survive it; {end}"
        marked = pa.array(faults, pa.string())
        if FAULT not in block.column_names:
            return block.append_column(FAULT, marked)
        known = block[FAULT]  # what has no frame is not decoded
        return block.set_column(block.column_names.index(FAULT), FAULT, pc.coalesce(known, marked))

    def fault_of(self, path: Path, format: str) -> str | None:
        """Say why a file must not be read here; None when it may be."""
        asked = json.dumps({"path": str(path), "format": format}).encode()
        deadly = self._find_deadly(pa.table({PAYLOAD: pa.array([asked], pa.binary())}))
        return (
            f"decoder_crashed: a process that read only this file did not survive it; {deadly[0]}" if deadly else None
        )

    def _find_deadly(self, payloads: pa.Table) -> dict[int, str]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, payloads.schema) as stream:
            stream.write_table(payloads)
        stream_bytes = sink.getvalue()
        self._send(len(stream_bytes).to_bytes(8), stream_bytes)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._gone()
        return {int(at): end for at, end in json.loads(answer).items()}

    def _send(self, *pieces: Any) -> None:
        assert self._process.stdin is not None
        try:
            for piece in pieces:
                self._process.stdin.write(piece)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._gone() from error

    def _gone(self) -> SourceUnavailableError:
        return SourceUnavailableError(
            f"the process that tries payloads out ended by itself (exit code {self._process.wait()}); its last words "
            "are in this task's log. Is there memory for a second process? A retry begins again.",
            exit_code=self._process.returncode,
        )


def _decoding(source: Source, schema: Mapping[str, str]) -> Callable[[pa.Array], object] | None:
    """What ingest does with the source's payloads; None when it has none to decode."""
    if isinstance(source, EncodedSource):
        return partial(decode_encoded, source.open_decoder)
    if source.format == "json":
        return partial(decode_json, dict(schema))
    return partial(decode_files, _FILE_MEMORY) if isinstance(source, FileReader) else None


def _read_tasted(source: Source, taster: Taster, span: Span) -> Iterator[pa.Table]:
    if isinstance(source, EncodedSource):
        yield from source.read(span, taster.mark)
    elif isinstance(source, FileReader) and source.format != "json":
        yield from source.read(span, taster.fault_of)
    else:
        yield from map(taster.mark, cut(source.read(span)))
