"""How much one batch may take: rows, bytes, and up to which time; applied when the span is planned, before its claim.

Invariants: a limit makes a span shorter and never moves its start, so what it leaves waits for the next run; at least
one row (one file) is taken where there is one; what a data interval asks for is not cut by bytes or time, for no later
run would take the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow_ai_provider.core.batch import Slice, Span
from airflow_ai_provider.core.ingest.kafka_span import cap
from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.ingest.contract import Source

log = logging.getLogger(__name__)
_BYTES = {"": 1, "B": 1, **{f"{unit}B": 1000**n for n, unit in enumerate("KMGT", 1)}}
_BYTES |= {f"{unit}IB": 1024**n for n, unit in enumerate("KMGT", 1)}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SAMPLES, _SAMPLE = 24, 200
"""Stretches of a topic that are looked at to learn how large its messages are, and offsets of each."""


@dataclass(frozen=True)
class Limits:
    """At most so much in one batch; what is beyond it waits for the next run.

    A mapping with the same keys will do too, and may hold templates: ``{"rows": "{{ params.row_limit }}"}``.

    :param rows: so many rows; 0 or None sets no limit.
    :param bytes: so many payload bytes: a number, or ``"500MB"``, ``"2GiB"``. Files count whole; of a topic the
        messages' size is estimated from a few hundred of them.
    :param until: only what arrived before this time (ISO 8601; UTC when it names no zone), or what is at least so old
        (``"5m"``); topics only.
    :raises SpecError: by :meth:`read`, when a value cannot be read; a retry does not help.
    """

    rows: int | str | None = None
    bytes: int | str | None = None
    until: str | datetime | timedelta | None = None

    @classmethod
    def of(cls, value: Limits | Mapping[str, Any] | None) -> Limits:
        """Take a value, or a mapping with its fields.

        :raises SpecError: when the mapping has other keys; a retry does not help.
        """
        if value is None or isinstance(value, Limits):
            return value or cls()
        unknown = sorted(set(value) - {"rows", "bytes", "until"})
        if unknown:
            raise SpecError(
                f"limits={dict(value)!r} has the unknown keys {unknown}; there are rows, bytes and until.",
                faults=[("limits", f"unknown keys {unknown}")],
            )
        return cls(**value)

    def read(self, now: datetime) -> Limit:
        """Turn what was written, its templates filled in, into numbers.

        :param now: what a duration counts back from.
        :raises SpecError: when a value cannot be read; a retry does not help.
        """
        return Limit(_read_rows(self.rows), read_bytes(self.bytes), _read_until(self.until, now))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Limit:
    """:class:`Limits` as numbers; None: no limit.

    :raises SpecError: on creation, when one cannot be kept; a retry does not help.
    """

    rows: int | None = None
    bytes: int | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _fault(name, value, "at least 1, or None for no limit")
        if self.until is not None and self.until.tzinfo is None:
            raise _fault("until", self.until, "give a time with a zone")


def plan_within(
    source: Source,
    position: Mapping[str, int],
    taken: Mapping[str, str],
    window: tuple[datetime, datetime] | None,
    limit: Limit,
) -> Span:
    """Fix the next span of a source within a limit.

    :raises SpecError: when files are to be taken by time; a retry does not help.
    """
    if window is not None or (limit.until is None and limit.bytes is None):
        return source.plan(position, taken, window, limit.rows)
    if limit.until is None:
        span = source.plan(position, taken, None, limit.rows)
    else:
        span = _older(source, source.plan(position, taken, None, None), limit.until)
        span = _shorter(span, limit.rows)
    if limit.bytes is None or span.is_empty:
        return span
    if any(s.digest for s in span.slices):
        return _fewer_files(span, limit.bytes)
    size = _bytes_per_offset(source, span)
    return _shorter(span, max(int(limit.bytes / size), 1) if size else None)


def _older(source: Source, span: Span, until: datetime) -> Span:
    """Leave out what arrived at a time or later: what lies from the first such record of a topic partition on."""
    if span.source.startswith("files:"):
        raise _fault("until", until.isoformat(), "files have no time of arrival; leave it out")
    reached = {s.partition: s.end for s in source.plan({}, {}, (_EPOCH, until), None).slices}
    slices = [replace(s, end=max(s.first, min(s.end, reached.get(s.partition, s.first)))) for s in span.slices]
    left = sum(s.end for s in span.slices) - sum(s.end for s in slices)
    if left:
        log.info(
            "%s: %s offsets wait for a later run: they lie behind a record stamped %s or later",
            span.source,
            f"{left:,}",
            until.isoformat(),
        )
    return replace(span, slices=tuple(s for s in slices if s.first < s.end), facts={**span.facts, "younger": left})


def _shorter(span: Span, rows: int | None) -> Span:
    if rows is None:
        return span
    capped = cap({int(s.partition): (s.first, s.end) for s in span.slices}, rows)
    return replace(span, slices=tuple(sorted(Slice(str(p), first, end) for p, (first, end) in capped.items())))


def _fewer_files(span: Span, byte_limit: int) -> Span:
    taken: list[Slice] = []
    size = 0
    for part in span.slices:
        size += part.end - part.first
        if taken and size > byte_limit:
            break
        taken.append(part)
    # how many rows are left is not known, and the plan's count would be wrong
    return replace(span, slices=tuple(taken), facts={n: v for n, v in span.facts.items() if n != "rows"})


def _bytes_per_offset(source: Source, span: Span) -> float:
    """Estimate from a few stretches, spread over the span: sizes change along a topic and between its partitions."""
    stretches = list(_stretches(span.slices))
    offsets = sum(s.end - s.first for s in stretches)
    with closing(source.read(replace(span, slices=tuple(stretches)))) as tables:  # type: ignore[type-var]
        size = sum(table["_payload"].nbytes for table in tables)
    return size / offsets if offsets else 0.0


def _stretches(slices: Sequence[Slice]) -> Iterator[Slice]:
    chosen = slices[:: -(-len(slices) // _SAMPLES)]
    each = max(_SAMPLES // len(chosen), 1)
    for part in chosen:
        step = max((part.end - part.first) // each, _SAMPLE)
        for first in range(part.first, part.end, step):
            yield replace(part, first=first, end=min(first + _SAMPLE, part.end))


def _read_rows(value: int | str | None) -> int | None:
    text = str(value).strip()
    if value is None or text in ("", "None"):
        return None
    if isinstance(value, bool) or not text.isdigit():
        raise _fault("rows", value, "write a whole number, or 0 for no limit")
    return int(text) or None


def read_bytes(value: int | str | None) -> int | None:
    """Read ``1000000``, ``"500MB"``, ``"2GiB"``; 0, None and an empty text set no limit.

    :raises SpecError: when it is none of these; a retry does not help.
    """
    if value is None or str(value).strip() in ("", "None"):
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", str(value).strip(), re.IGNORECASE)
    if isinstance(value, bool) or not found or found[2].upper() not in _BYTES:
        raise _fault("bytes", value, "write a whole number, 500MB or 2GiB")
    return int(float(found[1]) * _BYTES[found[2].upper()]) or None


def read_duration(value: Any) -> timedelta:
    """Read ``90s``, ``30m``, ``4h``, ``1h30m``, ``2d``.

    :raises ValueError: when it is none, or not between one second and a year.
    """
    pieces = re.findall(r"(\d+)([smhdw])", value) if isinstance(value, str) else []
    if not pieces or "".join(n + u for n, u in pieces) != value:
        raise ValueError(f"{value!r} is not a duration. Write a number and a unit, such as 90s, 30m, 4h or 2d")
    seconds = sum(int(number) * _SECONDS[unit] for number, unit in pieces)
    if not 0 < seconds <= 366 * _SECONDS["d"]:
        raise ValueError(f"{value!r} is not between one second and a year")
    return timedelta(seconds=seconds)


def _read_until(value: str | datetime | timedelta | None, now: datetime) -> datetime | None:
    if isinstance(value, timedelta):
        return now - value
    if value is None or isinstance(value, datetime):
        return value
    text = value.strip()
    if text in ("", "None"):
        return None
    try:
        if re.fullmatch(r"(\d+[smhdw])+", text):
            return now - read_duration(text)
        found = datetime.fromisoformat(text)
    except ValueError:
        raise _fault("until", value, "write a time (2026-01-31T12:00:00Z) or an age (5m, 2h)") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _fault(name: str, value: object, rule: str) -> SpecError:
    return SpecError(f"limits: {name}={value!r}; {rule}.", faults=[(f"limits.{name}", rule)])
