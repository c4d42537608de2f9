"""Rows through a model server: in batches, many at a time, each row once.

1. features: rows become arrays; a row that cannot is an error already and is not sent
2. batches at fixed places of the rows go out, ``in_flight`` at a time
3. a batch that is refused is tried by halves, until the rows that are refused stand alone: those are row errors with
   the server's reason. Before that the server must predict the sample that it predicted at the start: where it cannot,
   it is the server that is unwell and not the rows
4. every output is held against what the first answer showed (names, shape, kind of type), then read as by every engine

Invariants: rows keep their place whatever the order of answers; nothing is guessed into an answer that has other rows
than were sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from airflow_ai_provider.core.batch import ROW_ID, Pin
from airflow_ai_provider.core.infer.inputs import Each
from airflow_ai_provider.core.infer.outcome import Reading, predictions, settle_reading
from airflow_ai_provider.core.infer.remote.endpoint import RemoteEndpoint
from airflow_ai_provider.core.infer.remote.wire import Array, Ask, Reply, Wire, demand_settled, mismatch
from airflow_ai_provider.errors import EngineUnavailableError, ModelPinError, RowMismatchError, SignatureError

T = TypeVar("T")
_FILLS = (0.0, 1.0, -0.5)  # those with which settle_reading asks
_NO_LABEL = "model_output: the model returned no label"
_MOST_ROWS, _BATCH_BYTES = 1024, 1 << 20


class Line(Protocol):
    """A way to the server: runs coroutines in a loop of its own."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return what comes of it."""

    async def ask(self, asked: Ask) -> Reply:
        """Ask until there is an answer that is not "later"."""

    async def ask_alone(self, asked: Ask) -> Reply:
        """The same while nothing else of ours is in flight."""

    def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True)
class _Output:
    """What the first answers showed of an output."""

    kind: str
    shape: tuple[int, ...]

    def hold(self, row_count: int) -> Array:
        """Make room for so many rows."""
        return np.zeros((row_count, *self.shape), object if self.kind == "U" else self.kind)


@dataclass
class _Job:
    """One call of predict."""

    arrays: list[Array]
    slots: dict[str, Array]
    errors: dict[int, str]


class RemoteEngine:
    """Predict rows with a model on a server; meets :class:`~airflow_ai_provider.core.infer.engine.Engine`.

    What device the server has, and whether it gives the same bits again, cannot be known from here: the engine is not
    steady, and its device is ``remote``.

    :param pin: the version that the server must serve.
    :param endpoint: how much is asked at a time.
    :param wire: the protocol.
    :param line: the way to the server; closed with the engine.
    :raises ModelPinError: the server serves another version; no retry helps.
    :raises SignatureError: the server refuses rows of the signature's types; no retry helps.
    :raises EngineUnavailableError: the server does not answer; a retry may help.
    """

    device = "remote"
    steady = False
    tunable = False  # its connection says how much is asked at a time
    traits: Mapping[str, Any] = MappingProxyType({})
    workers = 2  # one prepares its rows while the other waits

    def __init__(self, pin: Pin, endpoint: RemoteEndpoint, wire: Wire, line: Line) -> None:
        self.name = f"remote-{endpoint.protocol}"
        self._pin, self._wire, self._line, self._in_flight = pin, wire, line, endpoint.in_flight
        self._wanted = endpoint.outputs
        line.run(wire.meet(line.ask))
        self._features = wire.features()
        self.row_bytes = self._features.row_bytes
        fitting = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, self.row_bytes)))
        self.batch_size = endpoint.batch_size or fitting
        self._most = 0  # rows that the server takes at a time, as far as it has shown; 0: as many as are sent
        self._outputs, self._reading = self._settle({fill: line.run(self._try(fill)) for fill in _FILLS})

    @property
    def proof(self) -> str:
        """How the server showed that it serves the pinned version; empty when it did not."""
        return self._wire.proof

    def needs(self, schema: pa.Schema) -> Sequence[str]:
        """Return the columns that predict reads, or raise SignatureError."""
        return self._features.needs(schema)

    def warm_up(self, batch_size: int) -> None:
        """Do nothing: the first call takes as long as the others."""

    def predict(self, rows: pa.Table, batch_size: int, each: Each = map) -> pa.Table:
        """Return one line per row, in the rows' order."""
        inputs = self._features.read(rows)
        slots = {name: output.hold(rows.num_rows) for name, output in self._outputs.items()}
        job = _Job(list(inputs.arrays), slots, dict(inputs.errors))
        if rows.num_rows:
            self._line.run(self._send(job, batch_size))
        for name, output in self._outputs.items():
            if output.kind == "U":
                job.slots[name] = job.slots[name].astype(np.str_)
        return predictions(rows[ROW_ID], list(job.slots.values()), job.errors, self._reading)

    def close(self) -> None:
        """Close all connections."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    async def _try(self, fill: float) -> dict[str, Array]:
        """Predict a sample; its refusal is about the model, not about a row."""
        sample = self._features.sample(fill, 2)
        reply, found = await self._ask(sample)
        if found is None and reply.status >= 500:
            raise EngineUnavailableError(
                f"the model server fails on a sample of what the signature of model {self._pin.name} says: "
                f"{reply.reason}. Look at the server's log; the retry asks again.",
                status=reply.status,
            )
        if found is None:
            raise SignatureError(
                f"the model server refuses what the signature of model {self._pin.name} says "
                f"({[list(a.shape) for a in sample]} of {[str(a.dtype) for a in sample]}): {reply.reason}. Serve the "
                "version that was pinned, or log it again with the signature of the rows that it takes.",
                status=reply.status,
            )
        return found

    async def _ask(self, arrays: Sequence[Array], *, alone: bool = False) -> tuple[Reply, dict[str, Array] | None]:
        """Return the answer and its outputs, None when the rows are refused."""
        asked = self._wire.encode(arrays)
        reply = await (self._line.ask_alone(asked) if alone else self._line.ask(asked))
        if reply.status == 200:
            return reply, self._wire.decode(reply, asked, len(arrays[0]))
        demand_settled(reply, f"model {self._pin.name}")
        if reply.status in (404, 410):
            raise ModelPinError(
                f"the model server does not serve version {self._pin.version} of model {self._pin.name}: "
                f"{reply.reason}. Let it load that version, or pin the one that it serves.",
                status=reply.status,
            )
        return reply, None

    def _settle(self, tries: Mapping[float, dict[str, Array]]) -> tuple[dict[str, _Output], Reading]:
        """Note how the outputs are read, and of those that are, their names, shapes and kinds."""
        first = tries[_FILLS[0]]
        missing = [name for name in self._wanted if name not in first]
        if missing or not first:
            raise SignatureError(
                f"the model server returns the outputs {sorted(first) or 'none'}, asked for are {list(self._wanted)}. "
                "Correct the extra 'outputs' of the connection.",
                found=sorted(first),
            )
        settled = {name: _settle_output(name, list(tries.values())) for name in self._wanted or first}
        cast = {fill: [_cast(n, found[n], kept) for n, kept in settled.items()] for fill, found in tries.items()}
        # Without scores there is nothing to ask whether it adds up.
        has_scores = any(np.dtype(kept.kind).kind == "f" for kept in settled.values())
        metadata = self._pin.metadata if has_scores else {**self._pin.metadata, "scores": "probabilities"}
        reading = settle_reading(lambda fill: cast[fill], metadata)
        reads_scores = reading.kind != "labels"
        reads_label = not reads_scores or (reading.classes is None and reading.label >= 0)
        names = list(settled)
        read = [names[reading.scores]] * reads_scores + [names[reading.label]] * reads_label
        reading = replace(reading, scores=0 if reads_scores else -1, label=len(read) - 1 if reads_label else -1)
        return {name: settled[name] for name in read}, reading

    async def _send(self, job: _Job, batch_size: int) -> None:
        row_count = len(job.arrays[0])
        batches = iter(range(0, row_count, batch_size))

        async def work() -> None:
            for start in batches:
                places = [row for row in range(start, min(start + batch_size, row_count)) if row not in job.errors]
                await self._send_batch(job, np.asarray(places, np.int64))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._in_flight, -(-row_count // batch_size))):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _send_batch(self, job: _Job, places: npt.NDArray[np.int64]) -> None:
        length = self._most or max(1, len(places))
        for start in range(0, len(places), length):
            piece = places[start : start + length]
            reply = await self._send_piece(job, piece)
            if reply is not None:
                await self._search(job, piece)

    async def _search(self, job: _Job, places: npt.NDArray[np.int64]) -> None:
        """Find the rows that are refused, one question at a time: a server that predicts requests together which come
        together refuses them together, and the rows of one would be blamed for those of another."""
        reply = await self._send_piece(job, places, alone=True)
        if reply is not None:
            await self._demand_well(reply)
            await self._halve(job, places, reply)

    async def _send_piece(self, job: _Job, places: npt.NDArray[np.int64], *, alone: bool = False) -> Reply | None:
        """Predict some rows; return the refusal, None when there was none."""
        reply, outputs = await self._ask([array[places] for array in job.arrays], alone=alone)
        if outputs is None:
            return reply
        for name, settled in self._outputs.items():
            if name not in outputs:
                raise RowMismatchError(
                    f"the model server answered without output {name!r}, which it gave before; it gave "
                    f"{sorted(outputs)}. Nothing was landed. Look at the model's code on the server.",
                    output=name,
                )
            array = _cast(name, outputs[name], settled)
            empty = _without_label(array, settled)
            if empty.any():
                job.errors |= dict.fromkeys(places[empty].tolist(), _NO_LABEL)
                array = np.where(empty, "" if settled.kind == "U" else 0, array)
            job.slots[name][places] = array
        return None

    async def _halve(self, job: _Job, places: npt.NDArray[np.int64], refusal: Reply) -> None:
        """Find the rows that are refused among some that were."""
        if len(places) == 1:
            job.errors[int(places[0])] = f"refused: {refusal.reason}"
            return
        halves = np.array_split(places, 2)
        refusals = [await self._send_piece(job, half, alone=True) for half in halves]
        if refusals == [None, None]:
            self._most = max(1, len(halves[1]))  # not the rows were refused, but so many of them
        for half, reply in zip(halves, refusals, strict=True):
            if reply is not None:
                await self._halve(job, half, reply)

    async def _demand_well(self, refusal: Reply) -> None:
        """Ask for the sample of the start again: a server that refuses it too refuses everything."""
        reply, found = await self._ask(self._features.sample(_FILLS[0], 2), alone=True)
        if found is None:
            raise EngineUnavailableError(
                f"the model server refuses rows ({refusal.reason}), and now also those that it predicted at the start "
                f"({reply.reason}). Look at the server's log; the retry goes on after the last finished part.",
                status=reply.status,
            )


def _settle_output(name: str, tries: Sequence[dict[str, Array]]) -> _Output:
    """Note an output's shape and kind; a number that is whole by chance is no other kind of output."""
    arrays = [found[name] for found in tries if name in found]
    kinds = {"U" if array.dtype.kind == "O" else array.dtype.kind for array in arrays}
    if len(arrays) < len(tries) or len({array.shape for array in arrays}) > 1 or len(kinds - {"f", "i"}) > 1:
        raise mismatch(name, 2, "another shape or type at each time")
    kind = "f8" if "f" in kinds and len(kinds) > 1 else arrays[0].dtype.str
    return _Output("U" if "U" in kinds else kind, arrays[0].shape[1:])


def _cast(name: str, array: Array, settled: _Output) -> Array:
    """Hold an output against what the first answers showed."""
    if array.shape[1:] != settled.shape:
        raise mismatch(name, len(array), f"shape {list(array.shape)} instead of {[len(array), *settled.shape]}")
    if settled.kind == "U":
        if array.dtype.kind not in "UO":
            raise mismatch(name, len(array), f"{array.dtype} instead of texts")
        return array
    if array.dtype.kind in "UO":
        raise mismatch(name, len(array), f"texts instead of {settled.kind}")
    dtype = np.dtype(settled.kind)
    if array.dtype.kind == "f" and dtype.kind != "f":
        # Numbers with a null among them: only what is whole may stay a label.
        known = array[~np.isnan(array)]
        if not (np.isfinite(known).all() and (known == np.floor(known)).all()):
            raise mismatch(name, len(array), "fractions instead of whole numbers")
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _without_label(array: Array, settled: _Output) -> npt.NDArray[np.bool_]:
    """Return which rows have no label at all: a null among texts or whole numbers."""
    if array.dtype.kind == "O":
        return np.array([value is None for value in array.reshape(len(array), -1)[:, 0]], bool)
    if array.dtype.kind == "f" and np.dtype(settled.kind).kind != "f":
        return np.isnan(array)
    return np.zeros(len(array), bool)
