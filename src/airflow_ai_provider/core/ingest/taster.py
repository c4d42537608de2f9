"""A process that tries payloads out: each try in a fork of its own, and those that end it are named one by one.

Run as ``python -m`` by :mod:`.contain`. Standard input: pickled seconds per row and ``decode(payloads)``, then blocks,
each eight bytes of length and an Arrow stream of one column; standard output: one JSON line per block, position → what
ended a process.

Invariants: it imports what decoding needs and starts no thread, so that forking is safe; a row is named only if it ends
a process alone; an exception is no end, the task meets it by itself.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import pyarrow as pa

DEADLINE_S = 30.0
"""How long a block may take, beside what its rows may."""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more blocks."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    row_s: float
    decode: Callable[[pa.Array], object]
    row_s, decode = pickle.load(requests)
    _decode_here(decode, pa.array([], pa.binary()))  # loads the parsers once, not once for each fork
    while size := requests.read(8):
        block = pa.ipc.open_stream(requests.read(int.from_bytes(size))).read_all()
        payloads = block.column(0).combine_chunks()
        answers.write(json.dumps(find_deadly(decode, payloads, row_s=row_s)).encode() + b"\n")
        answers.flush()


def find_deadly(
    decode: Callable[[pa.Array], object], payloads: pa.Array, first: int = 0, row_s: float = 0.002
) -> dict[int, str]:
    """Return position → what ended a process that decoded this payload alone.

    Halves what ends one, so a block costs one fork, and a deadly row about twice the logarithm of the block's size.
    """
    end = _try_out(decode, payloads, DEADLINE_S + row_s * len(payloads))
    if not end:
        return {}
    if len(payloads) == 1:
        return {first: end}
    half = len(payloads) // 2
    found = find_deadly(decode, payloads.slice(0, half), first, row_s)
    return found | find_deadly(decode, payloads.slice(half), first + half, row_s)


def _try_out(decode: Callable[[pa.Array], object], payloads: pa.Array, deadline_s: float) -> str:
    """Decode in a fork; return what ended it, or an empty text."""
    pid = os.fork()
    if pid == 0:
        _decode_here(decode, payloads)
        os._exit(0)
    code = _wait(pid, deadline_s)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return f"it was not through after {deadline_s:.0f} s"
    return f"it was ended by {signal.Signals(-code).name}" if code < 0 else ""


def _decode_here(decode: Callable[[pa.Array], object], payloads: pa.Array) -> None:
    try:
        decode(payloads)
    except BaseException:
        return  # the task gets the same exception, and it says more there


def _wait(pid: int, deadline_s: float) -> int | None:
    """The exit code, negative for a signal; None when it is not through in time."""
    deadline, pause_s = time.monotonic() + deadline_s, 0.0002
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.02)
    return None


def decode_json(schema: dict[str, str], payloads: pa.Array) -> Any:
    """Decode JSON payloads as ingest does."""
    from airflow_ai_provider.core.batch import ROW_ID
    from airflow_ai_provider.core.ingest.contract import PAYLOAD
    from airflow_ai_provider.core.ingest.decode import RowDecoder

    ids = pa.repeat(pa.scalar("", pa.string()), len(payloads))
    return RowDecoder(schema, "json").decode(pa.table({ROW_ID: ids, PAYLOAD: payloads}))


def decode_files(memory: int, payloads: pa.Array) -> None:
    """Read files as ingest does; one that needs more memory ends the process, for a small file can stand for any size.

    :param memory: bytes, beside what the process has anyhow.
    """
    from airflow_ai_provider.core.batch import Slice
    from airflow_ai_provider.core.ingest.files import read_rows

    for asked in map(json.loads, payloads.to_pylist()):
        _limit_memory(memory)
        try:
            with open(asked["path"], "rb") as file:
                for _ in read_rows(file, Slice(asked["path"], 0, 1, "sha256:"), asked["format"], lambda chunk: None):
                    pass
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel would do with the task


def _limit_memory(memory: int) -> None:
    with suppress(OSError, ValueError), open("/proc/self/statm") as file:  # only Linux says what a process has
        limit = int(file.read().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def decode_encoded(open_decoder: Callable[[], Any], payloads: pa.Array) -> Any:
    """Decode Avro or Protobuf payloads as ingest does."""
    return open_decoder().decode(payloads)


if __name__ == "__main__":
    # a broken pipe: the task that asked was killed, and wants no answer
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb") as answer_pipe:
        os.dup2(2, 1)  # what a parser prints goes to the log
        serve(sys.stdin.buffer, answer_pipe)
