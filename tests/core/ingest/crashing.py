"""Decoders that really die: by reading an address that is not theirs, and by a parser's own fault."""

from __future__ import annotations

import ctypes
import io
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json

from airflow_ai_provider.core.ingest.encoded.wire import DecodedBlock


class CrashingDecoder:
    """Takes a payload for text, and dies of some."""

    @property
    def facts(self) -> Sequence[Mapping[str, Any]]:
        return []

    def decode(self, payloads: pa.ChunkedArray) -> DecodedBlock:
        texts: list[str] = []
        good: list[int] = []
        faults: dict[int, str] = {}
        for at, payload in enumerate(payloads.to_pylist()):
            if payload is None:
                faults[at] = "tombstone: nothing"
                continue
            self._suffer(payload)
            texts.append(payload.decode())
            good.append(at)
        return DecodedBlock(
            pa.table({"text": pa.array(texts, pa.string())}),
            np.array(good, np.int64),
            faults,
            pa.nulls(len(payloads), pa.int32()),
        )

    def _suffer(self, payload: bytes) -> None:
        if payload.startswith(b"segv"):
            ctypes.string_at(0)
        if payload.startswith(b"abort"):
            os.abort()
        if payload.startswith(b"hang"):
            time.sleep(3600)
        if payload.startswith(b"raise"):
            raise MemoryError


class ArrowJsonDecoder(CrashingDecoder):
    """Reads blocks with pyarrow.json, whose version 25 ends the process at a block that begins with ``null``."""

    def decode(self, payloads: pa.ChunkedArray) -> DecodedBlock:
        lines = [p for p in payloads.to_pylist() if p is not None]
        with suppress(pa.ArrowInvalid):
            pyarrow.json.read_json(io.BytesIO(b"\n".join(lines)))
        return super().decode(payloads)
