"""A trial: champion and challenger predict the same batch, and a gate says whether the challenger may go on.

Invariants: both are pinned; both batches of predictions stay in the store, so what was compared can be read again; an
alias is moved once per trial and only away from the version that the trial saw; the move is in the ledger before it is
made.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from airflow_ai_provider.core.batch import ACCEPTED, BatchRef, Pin, digest_of
from airflow_ai_provider.core.infer.cache import hash_files
from airflow_ai_provider.core.infer.compare import Comparison, Gate, compare, measure_speed
from airflow_ai_provider.core.infer.engine import Engine, model_file, open_engine
from airflow_ai_provider.core.infer.flow import infer
from airflow_ai_provider.core.ledger import Entry, Intent, Ledger, Outcome
from airflow_ai_provider.errors import GateFailedError, IdempotencyConflictError, ModelPinError, SpecError

if TYPE_CHECKING:
    import pyarrow as pa

    from airflow_ai_provider.core.store import Store

log = logging.getLogger(__name__)
_SAMPLE_ROWS, _CALIBRATION_ROWS, _CALIBRATION_CALL = 4096, 256, 32


class Aliases(Protocol):
    """Where a registry's aliases point."""

    def aliases(self, name: str) -> dict[str, str]:
        """Return alias → version of a registered model."""

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias point to a version."""


class Versions(Protocol):
    """Where new versions of a model go."""

    def find(self, name: str, tags: Mapping[str, str]) -> str | None:
        """Return the newest version with these tags."""

    def register_onnx(
        self, source: Pin, folder: Path, path: Path, *, tags: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> str:
        """Register a file as a new version."""


def hold_trial(
    batch: BatchRef,
    store: Store,
    champion: tuple[Pin, Engine],
    challenger: tuple[Pin, Engine],
    gate: Gate,
    *,
    pipeline: str,
    progress: Callable[[str], None] = log.info,
) -> Comparison:
    """Let both models predict a batch, compare, and demand that the challenger passes the gate.

    :param batch: the reference batch; with labels when the gate names a label column.
    :return: the comparison of a challenger that passed.
    :raises GateFailedError: it did not reach a bar, with all figures in ``comparison``; a retry does not help.
    """
    refs = [
        infer(batch, pin, store, engine, pipeline=pipeline, progress=progress) for pin, engine in (champion, challenger)
    ]
    found = compare(store, batch, (champion[0], refs[0]), (challenger[0], refs[1]), gate)
    sample = sample_of(store, batch)
    if sample is not None:
        speeds = measure_speed([champion[1], challenger[1]], sample)
        scores = (replace(s, rows_per_s=v) for s, v in zip((found.champion, found.challenger), speeds, strict=True))
        found = Comparison(found.row_count, found.agreement, *scores)
    progress(found.to_text())
    failures = gate.failures(found)
    if failures:
        raise GateFailedError(
            f"{found.challenger.model} does not pass its gate beside {found.champion.model} on {found.row_count} rows "
            f"of batch {batch.batch_id}: {'; '.join(failures)}. Nothing was registered and no alias was moved. Train "
            "it better, or change the gate where it is written.",
            failures=failures,
            comparison=found.to_dict(),
        )
    return found


def sample_of(store: Store, batch: BatchRef, row_count: int = _SAMPLE_ROWS) -> pa.Table | None:
    """Return the first rows of a batch; None when it has none."""
    for part in store.manifest(batch).table(ACCEPTED):
        if part.row_count:
            return store.read_part(batch, part).slice(0, row_count)
    return None


@dataclass(frozen=True)
class Derived:
    """A model made of another one.

    :param path: its file.
    :param pin: what it is, before it has a version of its own.
    :param comparison: how it did beside the original.
    """

    path: Path
    pin: Pin
    comparison: Comparison


def derive_quantized(
    pin: Pin, folder: Path, batch: BatchRef, store: Store, *, method: str, gate: Gate, pipeline: str, scratch: Path
) -> Derived:
    """Make a model with weights of eight bits, and hold it against the original on a reference batch.

    :param pin: the original, of flavor onnx; its files lie in ``folder``.
    :param method: ``dynamic`` or ``static``; the static one takes its ranges from rows of the batch.
    :param scratch: empty folder that takes the new file.
    :raises SpecError: the model is not ONNX, the batch has no rows, or there is nothing to quantise; no retry helps.
    :raises GateFailedError: it does not pass the gate; a retry does not help.
    """
    sample = sample_of(store, batch)
    if pin.flavor != "onnx" or sample is None:
        fault = (
            f"model {pin.name} is of flavor {pin.flavor!r}, not onnx" if sample else f"batch {batch.batch_id} is empty"
        )
        raise SpecError(f"{fault}: nothing can be quantised and held against it.", faults=[("model", fault)])
    from airflow_ai_provider.core.infer.onnx import OnnxEngine
    from airflow_ai_provider.core.infer.quantize import quantize

    source, target = model_file(pin, folder), scratch / "model.onnx"
    with OnnxEngine(pin, source, "cpu") as champion:
        quantize(source, target, method, champion.calls(sample.slice(0, _CALIBRATION_ROWS), _CALIBRATION_CALL))
        files = hash_files(scratch)
        made = replace(pin, version=f"{pin.version}-int8-{method}", alias="", digest=digest_of(files), files=files)
        with open_engine(made, scratch, "cpu") as challenger:
            found = hold_trial(batch, store, (pin, champion), (made, challenger), gate, pipeline=pipeline)
    return Derived(target, made, found)


def quantized_version(
    pin: Pin, folder: Path, batch: BatchRef, store: Store, registry: Versions, *, method: str, gate: Gate, pipeline: str
) -> str:
    """Quantise, compare, register: the version that a model of eight bits has, or had already.

    :param registry: where the new version goes.
    :return: the version. A second call with the same source, method, gate and batch returns the first one's.
    """
    made_from = {"source": pin.digest, "method": method, "gate": gate.to_dict(), "batch": batch.digest}
    tags = {"ai.quantized_from": f"{pin.name}/{pin.version}", "ai.quantized": digest_of(made_from)[7:23]}
    known = registry.find(pin.name, tags)
    if known is not None:
        log.info("version %s of %s was registered from %s by an earlier try", known, pin.name, pin.version)
        return known
    with tempfile.TemporaryDirectory(prefix="quantized-") as scratch:
        made = derive_quantized(
            pin, folder, batch, store, method=method, gate=gate, pipeline=pipeline, scratch=Path(scratch)
        )
        found = made.comparison
        figures = {"ai.method": method, "ai.agreement": f"{found.agreement:.6f}", "ai.speedup": f"{found.speedup:.3f}"}
        # the confidence of other weights is another: the source's calibration would mislead the bars of a policy
        kept = {name: value for name, value in pin.metadata.items() if name != "calibration"}
        return registry.register_onnx(pin, folder, made.path, tags=tags | figures, metadata=kept)


def promote(
    champion: tuple[Pin, Path],
    challenger: tuple[Pin, Path],
    *,
    batch: BatchRef,
    gate: Gate,
    device: str,
    store: Store,
    ledger: Ledger,
    registry: Aliases,
    pipeline: str,
    run_id: str,
    progress: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """Hold a trial and, when the challenger passes, let the champion's alias point to it.

    :param champion: the pin, resolved from an alias, and the folder of its files.
    :param challenger: the pin of another version of the same model, and the folder of its files.
    :return: what :func:`move_alias` returns, with ``comparison`` and ``report``; of a move that this run has made
        already, what it returned then.
    :raises SpecError: the two are not versions of one model, or the champion has no alias; a retry does not help.
    """
    (old, old_folder), (new, new_folder) = champion, challenger
    if not old.alias or old.name != new.name:
        fault = (
            f"the champion {old.name}/{old.version} was pinned without an alias: pin it as {old.name}@ALIAS"
            if not old.alias
            else f"{old.name} and {new.name} are two models: an alias points to versions of one"
        )
        raise SpecError(f"nothing can be promoted: {fault}.", faults=[("champion", fault)])
    move = Move(old.alias, old, new, run_id, batch.batch_id)
    made = made_move(ledger, move)
    if made is not None:
        progress(f"this run moved alias {old.alias} of {old.name} from {old.version} to {new.version} already")
        return made
    with open_engine(old, old_folder, device) as first, open_engine(new, new_folder, device) as second:
        found = hold_trial(batch, store, (old, first), (new, second), gate, pipeline=pipeline, progress=progress)
    trial = digest_of([old.digest, new.digest, batch.digest, gate.to_dict()])[7:23]
    told = {"batch": batch.to_dict(), "gate": gate.to_dict(), "alias": old.alias, "run": run_id}
    report = write_report(store, f"{pipeline}/trials/{old.name}-{trial}", found, told)
    return move_alias(registry, ledger, move, {"comparison": found.to_dict(), "report": report})


@dataclass(frozen=True)
class Move:
    """An alias on its way from one version to another.

    :param run_id: the run that moves it.
    :param batch_id: what the trial was held on.
    """

    alias: str
    champion: Pin
    challenger: Pin
    run_id: str
    batch_id: str

    @property
    def fingerprint(self) -> str:
        """Digest of both versions and their bytes."""
        pins = (self.champion, self.challenger)
        return digest_of([[pin.version, pin.digest] for pin in pins])


def move_alias(registry: Aliases, ledger: Ledger, move: Move, why: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Let an alias point from the champion to the challenger: compare and set, once.

    1. Reserve the alias's next move in the ledger: one move leads out of each state, so of two promotions at once
       one gets it and the other is refused.
    2. Look where the alias points: it must still be the champion.
    3. Set it, look again, and record the move.

    A retry finds its own move and goes on with it. The registry has no compare-and-set of its own: who moves the alias
    by hand between 2 and 3, past this ledger, is overwritten.

    :param why: plain JSON that is recorded with the move.
    :return: ``moved``, ``from``, ``to`` and what ``why`` holds; ``moved`` is false when the challenger held the alias
        already.
    :raises ModelPinError: the alias points elsewhere by now; nothing was moved, a retry does not help.
    :raises IdempotencyConflictError: another promotion of this alias is under way; clear its task first.
    """
    name, old, new = move.champion.name, move.champion.version, move.challenger.version
    made = made_move(ledger, move)
    if made is not None:
        return made
    intent = _begun(ledger, move) or _intent(ledger, move)
    try:
        ledger.reserve([intent])  # 1
    except IdempotencyConflictError as error:
        raise IdempotencyConflictError(
            f"alias {move.alias} of {name} is being moved by another run, to another version than {new}. Let that run "
            "finish (clear its failed task), then clear this one.",
            keys=[intent.key],
        ) from error
    ledger.sent([intent.key])
    now = registry.aliases(name).get(move.alias, "")  # 2
    if now not in (old, new):
        ledger.record([Outcome(intent.key, "refused", {"reason": f"the alias points to version {now or 'none'}"})])
        raise ModelPinError(
            f"alias {move.alias} of {name} points to version {now or 'none'}, and the trial was held against version "
            f"{old}: somebody moved it meanwhile. Nothing was moved. Hold the trial again.",
            name=name,
            alias=move.alias,
            found=now,
        )
    begun = isinstance(intent, Entry) and intent.state == "sent"  # by a try that was killed
    outcome = {**(why or {}), "moved": now != new or begun, "from": old, "to": new}
    if now != new:
        registry.set_alias(name, move.alias, new)  # 3
    ledger.saw_aliases(move.champion.registry, name, registry.aliases(name))
    ledger.record([Outcome(intent.key, "done", outcome)])
    return outcome


def made_move(ledger: Ledger, move: Move) -> dict[str, Any] | None:
    """Return what :func:`move_alias` returned to this run; None when it has not made this move."""
    begun = _begun(ledger, move)
    return dict(begun.outcome) if begun is not None and begun.state == "done" else None


def _begun(ledger: Ledger, move: Move) -> Entry | None:
    """The move as this run has begun it, unless it was refused."""
    known = ledger.entries(f"models:{move.champion.name}", run_id=move.run_id, action=f"alias {move.alias}")
    mine = [entry for entry in known if entry.fingerprint == move.fingerprint and entry.state != "refused"]
    return mine[-1] if mine else None


def _intent(ledger: Ledger, move: Move) -> Intent:
    """The alias's next move."""
    name, pipeline, action = move.champion.name, f"models:{move.champion.name}", f"alias {move.alias}"
    settled = len(ledger.entries(pipeline, action=action, states=["done", "refused"]))
    return Intent(
        key=digest_of([move.champion.registry, pipeline, action, settled]),
        pipeline=pipeline,
        action=action,
        subject=f"{name}@{move.alias} #{settled + 1}",
        fingerprint=move.fingerprint,
        run_id=move.run_id,
        row_id="",
        batch_id=move.batch_id,
        step=0,
        saga=f"{name}@{move.alias}",
        request={"from": move.champion.version, "to": move.challenger.version},
    )


def write_report(store: Store, folder: str, found: Comparison, told: Mapping[str, Any]) -> str:
    """Store a comparison as ``report.json`` and ``report.md``.

    :param folder: below the store's root.
    :param told: what else belongs into it: batch, gate, what was done.
    :return: URI of the Markdown.
    """
    data = {**told, "comparison": found.to_dict()}
    store.write_bytes(f"{folder}/report.json", json.dumps(data, indent=1, sort_keys=True).encode())
    store.write_bytes(f"{folder}/report.md", found.to_text().encode())
    return f"{store.root}/{folder}/report.md"
