"""Why was this done? From a row or a subject back over action, decision, confidence, model and row to its offset.

Invariants: reads only; says what the ledger and the stored batches hold and nothing else; a row is found wherever it
ended: acted on, held, failed in the model or in quarantine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ACCEPTED, PREDICTIONS, QUARANTINE, ROUTES, ROW_ID, BatchRef
from airflow_ai_provider.core.ingest.quarantine import Quarantine, find_quarantines
from airflow_ai_provider.core.ingest.replay import rows_of
from airflow_ai_provider.core.ledger import Claim, Entry, Ledger
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SpecError

_DECIDED = ("route", "reason", "confidence", "bar", "decision", "decided_by")
_SCORED = ("prediction", "score")
_ORIGIN = ("_topic", "_partition", "_offset", "_timestamp", "_file", "_row")


@dataclass(frozen=True)
class Story:
    """All that is known about one row in one run.

    :param row_id: the row.
    :param run_id: the run.
    :param origin: where the row came from: source, batch, topic partition and offset or file.
    :param row: its columns.
    :param model: the pin, with prediction and score; empty for a row that no model saw.
    :param decision: route, reason, confidence, bar and what was decided by whom; empty when nothing was.
    :param review: what a person answered; empty when nobody was asked.
    :param actions: ledger entries, oldest step first, undos after what they undo.
    :param fate: where the row ended when it was not routed: ``quarantined: …`` or ``failed: …``.
    :param replays: what became of it after quarantine, oldest first: ``batch``, ``run_id``, ``at``, ``became``
        (``accepted``, or ``quarantined: …`` again); empty while it waits.
    """

    row_id: str
    run_id: str
    origin: Mapping[str, Any]
    row: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    decision: Mapping[str, Any] = field(default_factory=dict)
    review: Mapping[str, Any] = field(default_factory=dict)
    actions: tuple[Entry, ...] = ()
    fate: str = ""
    replays: tuple[Mapping[str, Any], ...] = ()


def explain(
    ledger: Ledger,
    store: Store,
    pipeline: str,
    *,
    row_id: str = "",
    subject: str = "",
    run_ids: Sequence[str] = (),
) -> list[Story]:
    """Tell the story of a row, or of every row about a subject.

    :param ledger: what was done.
    :param store: where batches lie.
    :param pipeline: the DAG's id.
    :param row_id: the row; or
    :param subject: a value of the pipeline's key column.
    :param run_ids: runs to look in; empty looks in every run that has acted on something.
    :return: one story per row and run, in the order of the runs; empty when it is not found.
    :raises SpecError: neither or both of row and subject are given; a retry does not help.
    """
    if bool(row_id) == bool(subject):
        raise SpecError("give either a row id or a subject.", faults=[("row", "give either a row id or a subject")])
    asked: Sequence[str | None] = run_ids or [None]
    entries = [entry for run in asked for entry in ledger.entries(pipeline, run_id=run)]
    about = [e for e in entries if (e.row_id == row_id if row_id else e.subject == subject)]
    # Runs that acted on it tell the most; only without one are the others searched, which may have held it.
    runs = run_ids or dict.fromkeys([e.run_id for e in about] or [e.run_id for e in entries])
    stories = []
    for run_id in runs:
        done = [e for e in about if e.run_id == run_id]
        wanted = {row_id} if row_id else {e.row_id for e in done}
        answers = {answer["row_id"]: answer for answer in ledger.reviews(pipeline, run_id)}
        for noted in ledger.decisions(pipeline, run_id):
            for story in _find(store, BatchRef.from_dict(noted["batch"]), run_id, wanted, subject):
                actions = tuple(entry for entry in done if entry.row_id == story.row_id)
                stories.append(replace(story, review=answers.get(story.row_id, {}), actions=actions))
    return _with_quarantine(store, find_quarantines(ledger, pipeline), stories, row_id, run_ids)


def _with_quarantine(
    store: Store, quarantines: Sequence[Quarantine], stories: list[Story], row_id: str, run_ids: Sequence[str]
) -> list[Story]:
    """Add where the row rests in quarantine, and to every quarantined row what its replays made of it."""
    held = {q.ref.batch_id: q for q in quarantines}
    told = {story.origin["batch"] for story in stories}
    resting = [
        story
        for q in held.values()
        if row_id and q.ref.batch_id not in told and (not run_ids or q.claim.run_id in run_ids)
        for story in _rest(store, q, row_id)
    ]
    order = list(held)  # oldest first; what was never in quarantine comes last, as it was told
    if resting:
        stories = sorted(
            [*resting, *stories], key=lambda s: order.index(b) if (b := s.origin["batch"]) in held else 1e9
        )
    return [_followed(store, story, held.get(story.origin["batch"])) for story in stories]


def _rest(store: Store, quarantine: Quarantine, row_id: str) -> Iterator[Story]:
    """Tell of a row in one quarantine, if it is there and the batch still is."""
    if not quarantine.may_hold(row_id) or quarantine.reasons(store) is None:
        return
    facts = store.manifest(quarantine.ref).facts
    for row in _rows(store, quarantine.ref.only(QUARANTINE), {row_id}, None, ""):
        fate = f"quarantined: {'; '.join(row.pop('_reasons') or [])}"
        origin = _source(quarantine.ref.batch_id, facts) | _origin(row)
        yield Story(row_id, quarantine.claim.run_id, origin, _columns(row), fate=fate)


def _followed(store: Store, story: Story, quarantine: Quarantine | None) -> Story:
    if quarantine is None or not story.fate.startswith("quarantined"):
        return story
    replays = tuple(
        {"batch": _name(claim), "run_id": claim.run_id, "at": claim.updated_at, "became": _became(store, claim, story)}
        for claim in quarantine.replays
        if story.row_id in rows_of(claim.span)
    )
    place = {"quarantine": f"{quarantine.ref.uri}/{QUARANTINE}", "landed": quarantine.claim.updated_at}
    return replace(story, origin={**story.origin, **place}, replays=replays)


def _name(claim: Claim) -> str:
    return claim.ref.batch_id if claim.ref else ""


def _became(store: Store, claim: Claim, story: Story) -> str:
    if claim.ref is None or store.find(claim.pipeline, claim.ref.kind, claim.ref.batch_id) is None:
        return "unknown: its batch has been removed from the store"
    for row in _rows(store, claim.ref.only(QUARANTINE), {story.row_id}, None, ""):
        return f"quarantined: {'; '.join(row['_reasons'] or [])}"
    return "accepted"


def _find(store: Store, routes: BatchRef, run_id: str, wanted: set[str], subject: str) -> Iterator[Story]:
    """Find rows by id, or by the value of the key column, in the routes and wherever rows end before them."""
    facts = store.manifest(routes).facts
    predictions = BatchRef.from_dict(facts["predictions"])
    source = BatchRef.from_dict(store.manifest(predictions).facts["input"])
    batch = store.manifest(source)
    common = _source(source.batch_id, batch.facts)
    model = {name: facts["pin"].get(name) for name in ("name", "version", "alias", "digest")}
    key = facts.get("key") if subject else None
    found = set()
    for row in _rows(store, routes.only(*ROUTES), wanted, key, subject):
        found.add(row[ROW_ID])
        scored = model | {name: row.pop(name) for name in _SCORED}
        decision = {name: row.pop(name) for name in _DECIDED}
        yield Story(row[ROW_ID], run_id, common | _origin(row), _columns(row), scored, decision)
    if found and not subject:
        return
    rows = {row[ROW_ID]: row for row in _rows(store, source.only(ACCEPTED), wanted - found, key, subject)}
    for scored in _rows(store, predictions.only(PREDICTIONS), set(rows) - found, None, ""):
        row, fate = rows[scored[ROW_ID]], f"failed in the model: {scored['error']}"
        yield Story(row[ROW_ID], run_id, common | _origin(row), _columns(row), model, fate=fate)
    for row in _rows(store, source.only(QUARANTINE), wanted - found, None, ""):
        fate = f"quarantined: {'; '.join(row.pop('_reasons') or [])}"
        yield Story(row[ROW_ID], run_id, common | _origin(row), _columns(row), fate=fate)


def _source(batch_id: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch's manifest says about where its rows came from."""
    told = {"source": (facts.get("span") or {}).get("source", ""), "batch": batch_id, "suite": facts.get("suite")}
    return {**told, "replay_of": facts["replay_of"]["batch_id"]} if "replay_of" in facts else told


def _rows(store: Store, ref: BatchRef, wanted: set[str], key: str | None, subject: str) -> Iterator[dict[str, Any]]:
    """Yield the rows with one of these ids, or with this subject in the key column."""
    ids = pa.array(sorted(wanted), pa.string())
    for table in store.read(ref):
        is_wanted = pc.is_in(table[ROW_ID], value_set=ids)
        if key in table.column_names:
            is_wanted = pc.or_(is_wanted, pc.fill_null(pc.equal(table[key].cast(pa.string()), subject), False))
        yield from table.filter(is_wanted).to_pylist()


def _origin(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name[1:]: row[name] for name in _ORIGIN if row.get(name) is not None}


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {name: value for name, value in row.items() if not name.startswith("_")}
    columns = {name: f"{len(v)} bytes" if isinstance(v, bytes) else v for name, v in columns.items()}
    return columns | {"payload": row["_payload"]} if "_payload" in row else columns
