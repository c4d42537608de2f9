"""Write one batch of accepted and quarantined rows, count them, refuse or land it.

Invariants: a part is written for each block that has such rows, in block order, so the same blocks give the same files;
every rejected row is counted under the code of its first reason; nothing exists until :meth:`Landing.land`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from airflow_ai_provider.core.batch import ACCEPTED, QUARANTINE, BatchRef
from airflow_ai_provider.core.ingest.contract import PAYLOAD, REASONS
from airflow_ai_provider.core.store import Store
from airflow_ai_provider.errors import BatchRejectedError

KIND = "batch"


class Landing:
    """One batch on its way into the store.

    :param store: where it goes.
    :param pipeline: whose batch it is.
    :param batch_id: its name, made of what it contains.
    """

    def __init__(self, store: Store, pipeline: str, batch_id: str) -> None:
        self._writer = store.open_batch(pipeline, KIND, batch_id)
        self._folder = f"{store.root}/{self._writer.folder}"
        self.accepted = self.quarantined = 0
        self.reasons: Counter[str] = Counter()

    def write(self, accepted: pa.Table, rejected: pa.Table) -> None:
        """Write one block: its accepted rows without their payload, and its quarantine rows."""
        if accepted.num_rows:
            kept = accepted.drop_columns([PAYLOAD]) if PAYLOAD in accepted.column_names else accepted
            self._writer.write(ACCEPTED, kept)
        if rejected.num_rows:
            self._writer.write(QUARANTINE, rejected)
        self.accepted += accepted.num_rows
        self.quarantined += rejected.num_rows
        self.reasons.update(reasons[0].partition(":")[0] for reasons in rejected[REASONS].to_pylist())

    @property
    def counts(self) -> dict[str, int]:
        """What the manifest will say, :attr:`read` being counted by the reader and not from these."""
        return {"accepted": self.accepted, "quarantined": self.quarantined}

    def refuse(self, read: int, max_rejected: float | int | None, failures: Sequence[str]) -> None:
        """Refuse the batch when too many rows failed, or a whole-batch rule did.

        :param max_rejected: share of the rows (float) or number of rows (int) that may be rejected; None: any.
        :raises BatchRejectedError: naming the top reasons and where the rejected rows lie; a retry does not help.
        """
        allowed = _allowed(read, max_rejected)
        if not failures and (allowed is None or self.quarantined <= allowed):
            return
        if failures:
            what = "whole-batch rules failed: " + "; ".join(failures)
        else:
            limit = f"{max_rejected:.4g} of them" if isinstance(max_rejected, float) else f"{max_rejected} rows"
            what = f"max_rejected allows {limit}"
        top = ", ".join(f"{code} {count}" for code, count in self.reasons.most_common(5)) or "none"
        raise BatchRejectedError(
            f"batch {self._writer.batch_id}: {self.quarantined} of {read} rows were rejected; {what}. "
            f"Top reasons: {top}. The rejected rows lie in {self._folder}/{QUARANTINE}; nothing was landed. "
            "Mend the source or the expectations, then clear this task: it takes the same rows again.",
            batch_id=self._writer.batch_id,
            uri=f"{self._folder}/{QUARANTINE}",
            counts={"read": read, **self.counts},
            reasons=dict(self.reasons),
            failures=list(failures),
        )

    def land(self, read: int, facts: Mapping[str, Any]) -> BatchRef:
        """Write the manifest.

        :param read: rows that came in, counted before decoding: they must be what was written.
        :raises RowMismatchError: when they are not; nothing is landed.
        """
        reasons = dict(sorted(self.reasons.items()))
        return self._writer.land({"read": read, **self.counts}, {**facts, "reasons": reasons})


def _allowed(read: int, max_rejected: float | int | None) -> float | None:
    if max_rejected is None:
        return None
    return max_rejected * read if isinstance(max_rejected, float) else max_rejected


def merge_texts(*texts: Iterable[str]) -> list[str]:
    """Return all texts once, in order of appearance."""
    return list(dict.fromkeys(text for group in texts for text in group))
