"""Records to columns: what a record lacks is null in its row, and no other row has it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from airflow_ai_provider.core.ingest.kafka_table import numbered, table_of

NO_TIME, CREATED, APPENDED = 0, 1, 2


@dataclass(frozen=True)
class Kept:
    """A record that is not a client's."""

    at: int
    text: bytes | None = b"{}"
    name: bytes | None = b"k"
    time: tuple[int, int] = (CREATED, 1_000)

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes | None:
        return self.name

    def value(self) -> bytes | None:
        return self.text

    def timestamp(self) -> tuple[int, int]:
        return self.time


def test_each_record_is_one_row_with_its_own_values() -> None:
    table = table_of("t", "0123456789", [Kept(7, b"a", None), Kept(9, None, b"x"), Kept(12, b"", b"")])

    assert table.column("_row_id").to_pylist() == ["t~01234567/3/7", "t~01234567/3/9", "t~01234567/3/12"]
    assert table.column("_payload").to_pylist() == [b"a", None, b""]
    assert table.column("_key").to_pylist() == [None, b"x", b""]
    assert table.column("_offset").to_pylist() == [7, 9, 12]
    assert set(table.column("_topic").to_pylist()) == {"t"} and set(table.column("_partition").to_pylist()) == {3}


def test_a_time_stays_with_its_record_and_a_record_without_one_has_none() -> None:
    times = [(CREATED, 1_000), (NO_TIME, -1), (APPENDED, 2_500), (CREATED, 0)]
    table = table_of("t", "", [Kept(at, time=time) for at, time in enumerate(times)])

    def at(second: float) -> datetime:
        return datetime.fromtimestamp(second, UTC)

    assert table.column("_timestamp").to_pylist() == [at(1), None, at(2.5), at(0)]
    assert table.column("_row_id")[1].as_py() == "t/3/1"


@given(
    st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 10**5), min_size=1),
    st.sampled_from([b"t/0/", b"topic~12345678/31/"]),
)
@example(list(range(9_990, 10_010)), b"t/0/")
@example(list(range(10_000, 10_020)), b"t/0/")
@example([0], b"t/0/")
def test_a_text_is_the_prefix_and_the_number(values: list[int], prefix: bytes) -> None:
    texts = numbered(prefix, np.array(values, np.int64))
    texts.validate(full=True)
    assert texts.to_pylist() == [f"{prefix.decode()}{value}" for value in values]
