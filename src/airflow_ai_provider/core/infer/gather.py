"""One batch predicted by several tasks: each predicts its shard's parts, and one lands what all of them wrote.

1. each shard: predict its own parts, store and mark them (as a whole run does), and report which batch they are part of
2. hold the reports against each other: every shard once, all of the same rows, model and options
3. prove each part by its mark and its bytes
4. hold the failed rows against the limit, write the manifest

Invariants: the predictions are those of one task, byte for byte; step 3 opens no model; nothing is landed before all
parts are proved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from airflow_ai_provider.core.batch import ACCEPTED, BatchRef, Part, Pin
from airflow_ai_provider.core.infer.batch_size import SizeMemory
from airflow_ai_provider.core.infer.engine import Engine
from airflow_ai_provider.core.infer.flow import Recipe, land, predict
from airflow_ai_provider.core.infer.part import DonePart
from airflow_ai_provider.core.infer.shard import Shard
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import CorruptBatchError, DeviceError, SpecError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardReport:
    """What one task says of the parts that it stored.

    :param shard: which parts.
    :param input_digest: digest of the batch that was read.
    :param pin_digest: digest of the model.
    :param options: what the bytes depend on besides; empty when the shard has no parts.
    :param failed: rows of the shard that failed.
    """

    shard: Shard
    input_digest: str
    pin_digest: str
    options: Mapping[str, Any]
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, as XCom carries it."""
        return {**vars(self), "shard": str(self.shard), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShardReport:
        """Read what :meth:`to_dict` wrote.

        :raises SpecError: when it is no report of a shard; a retry does not help.
        """
        try:
            return cls(**{**data, "shard": Shard.parse(data["shard"])})
        except (TypeError, KeyError) as error:
            raise SpecError(
                f"{data!r} is no report of a shard ({error}). Give the outputs of the tasks that predicted with "
                "shard=….",
                faults=[("shards", "not a report of a shard")],
            ) from error


def predict_shard(
    batch: BatchRef,
    pin: Pin,
    store: Store,
    open_engine: Callable[[], AbstractContextManager[Engine]],
    shard: Shard,
    *,
    pipeline: str,
    batch_size: int | None = None,
    memory: SizeMemory | None = None,
    progress: Callable[[str], None] = log.info,
    measured: Callable[[str, float], None] = lambda name, value: None,
) -> ShardReport:
    """Predict and store one shard's parts; nothing is landed.

    :param open_engine: loads the model; called only when the shard has parts. (The first shard always loads it: the
        name even of an empty batch says what would have predicted it.)
    :return: the report, for :func:`gather`. The other parameters and errors are those of
        :func:`~airflow_ai_provider.core.infer.flow.infer`.
    """
    options: Mapping[str, Any] = {}
    failed = 0
    if shard.index == 1 or any(shard.takes(n) for n in range(len(store.manifest(batch).table(ACCEPTED)))):
        with open_engine() as engine:
            recipe, done = predict(
                batch,
                pin,
                store,
                engine,
                pipeline=pipeline,
                shard=shard,
                batch_size=batch_size,
                memory=memory,
                progress=progress,
                measured=measured,
            )
        options, failed = recipe.options, sum(part.failed for part in done)
    return ShardReport(shard, batch.digest, pin.digest, options, failed)


def gather(
    batch: BatchRef,
    pin: Pin,
    store: Store,
    reports: Iterable[ShardReport],
    *,
    pipeline: str,
    max_failed: float | int | None = None,
) -> BatchRef:
    """Land what the shards of a batch have predicted.

    :param reports: one of each shard.
    :return: reference of the predictions, the same as that of one task which predicts all.
    :raises SpecError: a shard is missing or twice, or predicted other rows or with another model; no retry helps.
    :raises DeviceError: the shards ran on devices that round otherwise; no retry helps.
    :raises CorruptBatchError: a part is not as its task left it; no retry helps.
    :raises BatchRejectedError: more rows failed than ``max_failed``; nothing is landed, no retry helps.
    """
    options = _agreed(list(reports), batch, pin)
    recipe = Recipe(batch, pin, options)
    sources = store.manifest(batch).table(ACCEPTED)
    return land(recipe, _proved(recipe, sources, store, pipeline), store, pipeline=pipeline, max_failed=max_failed)


def _agreed(reports: Sequence[ShardReport], batch: BatchRef, pin: Pin) -> Mapping[str, Any]:
    """Return the options of all shards."""
    given = sorted(str(report.shard) for report in reports)
    count = reports[0].shard.count if reports else 0
    if not reports or given != sorted(f"{index}/{count}" for index in range(1, count + 1)):
        raise SpecError(
            f"the shards {', '.join(given) or '(none)'} are not all shares of a batch, each once. Map the task over "
            "shards(N) and give its whole output.",
            faults=[("shards", f"{given} is not each shard once")],
        )
    strange = [str(r.shard) for r in reports if (r.input_digest, r.pin_digest) != (batch.digest, pin.digest)]
    if strange:
        raise SpecError(
            f"shards {', '.join(strange)} predicted another batch or with another model than this task was given. "
            "Give it the same batch and model as the shards.",
            faults=[("shards", f"{strange} are of another batch or model")],
        )
    ran = {str(report.shard): dict(report.options) for report in reports if report.options}
    first = next(iter(ran.values()))
    if any(options != first for options in ran.values()):
        raise DeviceError(
            f"the shards did not all run alike: {ran}. Their results round otherwise, so they are no one batch, and "
            "nothing was landed. Ask for one device (cpu or require_cuda) and clear the shards.",
            options=ran,
        )
    return first


def _proved(recipe: Recipe, sources: Sequence[Part], store: Store, pipeline: str) -> list[DonePart]:
    shelf = recipe.shelf(store, pipeline)
    done = [shelf.done(number, source) for number, source in enumerate(sources)]
    missing = [number for number, part in enumerate(done) if part is None]
    if missing:
        raise CorruptBatchError(
            f"parts {missing[:10]} of the predictions {recipe.batch_id} are not as the shards left them. Nothing was "
            "landed. Clear the shards to predict them again.",
            missing=missing,
        )
    return [part for part in done if part is not None]
