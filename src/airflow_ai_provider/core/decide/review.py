"""A person's turn: rows → questions that a form can show, and the answers → rows again.

Invariants: the same rows always give the same questions, so that whoever resumes rebuilds them; a row that nobody
answered is held, never acted on; an answer that is no choice is an error, never a value; every row comes out once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from airflow_ai_provider.core.batch import ROW_ID, BatchRef, Manifest, digest_of
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import SpecError

KIND = "review"
HOLD = "hold"
MAX_ROWS = 100
MAX_CHOICES = 50
_NO_ANSWER = "no answer"
_HELD = "held by a person"


@dataclass(frozen=True)
class Question:
    """One ambiguous row.

    :param row_id: the row.
    :param subject: the value of its key column, or the row id.
    :param prediction: what the model says; None when it says nothing.
    :param confidence: how sure it is; None when it is not known.
    :param reason: why a person is asked.
    :param shown: the columns shown beside it.
    """

    row_id: str
    subject: str
    prediction: Any
    confidence: float | None
    reason: str
    shown: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Questions:
    """All questions of one review, least confident first.

    :param questions: the rows that are shown.
    :param choices: answers allowed besides ``hold``: decision values of the type that the model predicts.
    :param over: how many rows are above the limit: they are held.
    :param max_rows: the limit.
    """

    questions: tuple[Question, ...]
    choices: tuple[Any, ...]
    over: int = 0
    max_rows: int = MAX_ROWS

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """Ids of the rows that are shown."""
        return tuple(question.row_id for question in self.questions)

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """One form field per row, by row id: ``default``, ``enum``, ``title``, ``description``; all texts."""
        enum = [*(_text(choice) for choice in self.choices), HOLD]
        return {
            question.row_id: {
                "default": _text(question.prediction) if _text(question.prediction) in enum else HOLD,
                "enum": enum,
                "title": question.subject,
                "description": "; ".join([question.reason, *(f"{k} {_text(v)}" for k, v in question.shown.items())]),
            }
            for question in self.questions
        }

    @property
    def body(self) -> str:
        """The review as Markdown: one line a row."""
        return "\n".join(_body(self))

    def faults(self, answers: Mapping[str, Any]) -> list[str]:
        """List what is wrong with answers; an empty list means that they can be applied.

        :param answers: row id → one of the choices (or its text), or ``hold``.
        """
        known, allowed = set(self.rows), {_text(choice) for choice in self.choices} | {HOLD}
        unknown = [row for row in answers if row not in known]
        wrong = [f"{row}: {value!r}" for row, value in answers.items() if row in known and _text(value) not in allowed]
        faults = []
        if unknown:
            faults.append(f"no question was asked about {_some(unknown)}")
        if wrong:
            faults.append(f"not one of {', '.join(sorted(allowed - {HOLD}))} or hold: {_some(wrong)}")
        return faults


def read_questions(
    store: Store,
    ref: BatchRef,
    *,
    choices: Sequence[Any] | None = None,
    columns: Sequence[str] | None = None,
    max_rows: int = MAX_ROWS,
) -> Questions:
    """Make the questions of one review.

    :param store: where batches lie.
    :param ref: rows to ask about, as the decide verb routed them.
    :param choices: answers allowed besides ``hold``; None takes the model's classes, or else what the model predicted.
    :param columns: columns to show; None shows none.
    :param max_rows: rows to show at the most, least confident first; the others will be held.
    :return: the questions; the same ones for the same arguments.
    :raises SpecError: a column is not there, or there is nothing to choose from; a retry does not help.
    """
    manifest = store.manifest(ref)
    rows = _sorted(_read(store, ref))
    if rows.num_rows == 0:
        return Questions((), (), 0, max_rows)
    allowed = _choices(manifest, rows, choices)
    unknown = [name for name in columns or () if name not in rows.column_names]
    if unknown:
        raise SpecError(
            f"review shows columns {', '.join(unknown)}, which the rows do not have; they have "
            f"{', '.join(rows.column_names)}. Correct the review's columns.",
            faults=[("columns", f"there is no column {name!r}") for name in unknown],
        )
    key = manifest.facts.get("key")
    asked = tuple(_question(row, key, columns or ()) for row in rows.slice(0, max_rows).to_pylist())
    return Questions(asked, allowed, max(rows.num_rows - max_rows, 0), max_rows)


def apply_answers(
    store: Store, ref: BatchRef, questions: Questions, answers: Mapping[str, Any], *, pipeline: str
) -> tuple[BatchRef, list[dict[str, Any]]]:
    """Turn answers into a batch: ``reviewed`` rows carry the person's decision, the others are held with a reason.

    :param store: where batches lie.
    :param ref: the rows that were asked about.
    :param questions: what was asked, from :func:`read_questions`.
    :param answers: row id → a choice or ``hold``; a row left out is held. Empty (nobody answered) holds all.
    :param pipeline: the DAG's id.
    :return: reference of the new batch, and one record per answered row for the ledger (``row_id``, ``subject``,
        ``before``, ``after``, ``confidence``, ``bar``).
    :raises SpecError: an answer names a row that was not asked about or a value that is no choice; nothing is landed; a
        retry does not help.
    """
    if faults := questions.faults(answers):
        text = "; ".join(faults)
        raise SpecError(
            f"these answers cannot be applied: {text}. Answer again.", faults=[("answers", f) for f in faults]
        )
    values = {_text(choice): choice for choice in questions.choices} | {HOLD: HOLD}
    given = {row: values[_text(value)] for row, value in sorted(answers.items())}
    rows = _read(store, ref)
    reviewed, held = _answered(rows, given, questions)
    key = store.manifest(ref).facts.get("key")
    name = digest_of([ref.digest, list(ref.tables), given, questions.max_rows])[7:19]
    writer = store.open_batch(pipeline, KIND, f"{ref.batch_id}-{name}")
    for table_name, table in (("reviewed", reviewed), (HOLD, held)):
        if table.num_rows:
            writer.write(table_name, table)
    counts = {"review": rows.num_rows, "answered": reviewed.num_rows, HOLD: held.num_rows}
    facts = {"rows": ref.to_dict(), "answers": given, "choices": list(questions.choices), "key": key}
    landed = writer.land(counts, facts | {"max_rows": questions.max_rows})
    return landed, list(_records(rows, given, key))


def _read(store: Store, ref: BatchRef) -> pa.Table:
    tables = list(store.read(ref))
    if not tables:
        return pa.table({ROW_ID: pa.array([], pa.string())})
    return pa.concat_tables(tables, promote_options="permissive")


def _sorted(rows: pa.Table) -> pa.Table:
    if rows.num_rows == 0:
        return rows
    # Ties are broken by row id: whoever resumes must see the same questions.
    by = [("confidence", "ascending", "at_start"), (ROW_ID, "ascending", "at_start")]
    return rows.take(pc.sort_indices(rows, sort_keys=by))


def _choices(manifest: Manifest, rows: pa.Table, choices: Sequence[Any] | None) -> tuple[Any, ...]:
    metadata = (manifest.facts.get("pin") or {}).get("metadata") or {}
    kind = rows["prediction"].type
    found = choices or metadata.get("classes") or pc.unique(rows["prediction"]).drop_null().to_pylist()
    try:
        # Written in a DAG file as texts, or kept as texts by the trainer: brought to what the model predicts.
        typed = pa.array(list(found)).cast(kind).to_pylist() if not pa.types.is_null(kind) else list(found)
    except pa.ArrowInvalid as error:
        raise SpecError(
            f"review offers {_some([str(c) for c in found])}, but the model predicts {kind}. "
            "Give choices that the model could predict.",
            faults=[("choices", f"do not fit {kind}")],
        ) from error
    distinct = tuple(dict.fromkeys(typed if choices or metadata.get("classes") else sorted(typed)))
    if not 0 < len(distinct) <= MAX_CHOICES or HOLD in distinct:
        what = (
            f"there are {len(distinct)} values to choose from" if HOLD not in distinct else "one choice is named hold"
        )
        raise SpecError(
            f"nobody can be asked: {what}; 1 to {MAX_CHOICES} are possible, besides hold. Give the review its choices.",
            faults=[("choices", what)],
        )
    return distinct


def _question(row: Mapping[str, Any], key: str | None, columns: Sequence[str]) -> Question:
    subject = _subject(row, key)
    shown = {name: row[name] for name in columns}
    return Question(row[ROW_ID], subject, row["prediction"], row["confidence"], row["reason"], shown)


def _subject(row: Mapping[str, Any], key: str | None) -> str:
    value = row.get(key) if key else None
    return str(row[ROW_ID]) if value is None else str(value)


def _answered(rows: pa.Table, given: Mapping[str, Any], questions: Questions) -> tuple[pa.Table, pa.Table]:
    if rows.num_rows == 0:
        return rows, rows
    ids, asked = rows[ROW_ID].to_pylist(), set(questions.rows)
    is_answered = pa.array([given.get(row, HOLD) != HOLD for row in ids])
    over = f"over the review's limit of {questions.max_rows}"
    why = [over if row not in asked else _HELD if row in given else _NO_ANSWER for row in ids]
    kind = rows["decision"].type if not pa.types.is_null(rows["decision"].type) else rows["prediction"].type
    decision = pa.array([given[row] if given.get(row, HOLD) != HOLD else None for row in ids], kind)
    rows = _set(_set(rows, "decision", decision), "decided_by", pa.repeat("person", len(ids)))
    held = _set(_set(rows, "decided_by", pa.nulls(len(ids), pa.string())), "route", pa.repeat(HOLD, len(ids)))
    reason = pc.binary_join_element_wise(held["reason"], pa.array(why, pa.string()), "; ")
    return rows.filter(is_answered), _set(held, "reason", reason).filter(pc.invert(is_answered))


def _set(rows: pa.Table, name: str, column: Any) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, column)


def _records(rows: pa.Table, given: Mapping[str, Any], key: str | None) -> Iterator[dict[str, Any]]:
    answered = pc.is_in(rows[ROW_ID], value_set=pa.array(list(given), pa.string()))
    for row in rows.filter(answered).to_pylist():
        yield {
            "row_id": row[ROW_ID],
            "subject": _subject(row, key),
            "before": row["prediction"],
            "after": given[row[ROW_ID]],
            "confidence": row["confidence"],
            "bar": row["bar"],
        }


def _body(questions: Questions) -> Iterator[str]:
    count = len(questions.questions)
    yield f"**{count} {'row' if count == 1 else 'rows'} to decide**, least confident first."
    if questions.over:
        yield f"\n{questions.over} more are over the limit of {questions.max_rows} and will be held."
    columns = list(questions.questions[0].shown) if questions.questions else []
    yield ""
    yield _line(["row", "prediction", "confidence", "reason", *columns])
    yield _line(["---"] * (4 + len(columns)))
    for q in questions.questions:
        sure = "none" if q.confidence is None else f"{q.confidence:.4f}"
        yield _line([q.subject, _text(q.prediction), sure, q.reason, *(_text(v) for v in q.shown.values())])


def _line(cells: Sequence[str]) -> str:
    # A value from outside must not end the cell, break the table or become a link or a tag.
    escaped = ("".join(f"\\{c}" if c in "|\\`*_[]<>#" else " " if c in "\r\n" else c for c in cell) for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "none" if value is None else json.dumps(value, default=str)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
