"""V1: ten expectations over rows of twelve columns in memory, the rows that break one split off with all reasons.

The limit is the same ten rules as polars expressions. Ours is the validator as ingest calls it, block by block. The
neighbour is Great Expectations over the whole frame with complete index lists, and no split.
"""

from __future__ import annotations

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import readings
from benchmarks.harness import Case, Place, Run

BLOCK = 100_000
_NAMES = [f"{rule['type']}({rule['kwargs']['column']})" for rule in readings.RULES]


def make(place: Place) -> None:
    """Write the rows."""
    chance = random.Random(1)
    made = [readings.reading(i, chance) for i in range(place.size)]
    columns = {}
    for name, kind in readings.SCHEMA.items():
        values = pa.array([row[name] for row in made])
        columns[name] = values.cast(pa.timestamp("us", tz="UTC")) if kind == "timestamp" else values
    ids = pa.array([f"r{i}" for i in range(place.size)])
    pq.write_table(pa.table({"_row_id": ids, **columns}), place.folder / "rows.parquet")


def open_limit(place: Place) -> Run:
    """The rules as polars expressions."""
    import polars as pl

    frame = pl.read_parquet(place.folder / "rows.parquet")
    column, low, high = pl.col, pl.datetime(2020, 1, 1, time_zone="UTC"), pl.datetime(2030, 1, 1, time_zone="UTC")
    broken = [
        column("reading_id").is_null(),
        ~column("reading_id").str.contains("^reading-[0-9]{9}$"),
        ~column("device").str.contains("^device-[0-9]{5}$"),
        ~column("site").is_in(readings.SITES),
        ~column("taken_at").is_between(low, high),
        ~column("temperature").is_between(-40, 60),
        ~column("humidity").is_between(0, 100),
        ~column("count").is_between(0, 1_000_000),
        ~column("operator").str.len_chars().is_between(1, 60),
        column("valid").is_null(),
    ]
    flags = [expression.fill_null(False).alias(str(i)) for i, expression in enumerate(broken)]
    numbers = [str(i) for i in range(len(flags))]

    def run() -> None:
        marked = frame.with_columns(flags)
        bad = pl.any_horizontal(numbers)
        accepted, rejected = marked.filter(~bad).drop(numbers), marked.filter(bad)
        why = {str(i): pl.when(column(str(i))).then(pl.lit(name)) for i, name in enumerate(_NAMES)}
        rejected = rejected.with_columns(pl.concat_list(list(why.values())).list.drop_nulls().alias("reasons"))
        assert accepted.height + rejected.height == frame.height
        rejected.select("_row_id", "reasons").write_json(place.folder / "limit.json")

    return run


def open_ours(place: Place) -> Run:
    """The validator, block by block."""
    from airflow_ai_provider.core.ingest.validate import GxValidator

    table = pq.read_table(place.folder / "rows.parquet").combine_chunks()
    blocks = [table.slice(first, BLOCK) for first in range(0, table.num_rows, BLOCK)]
    validator = GxValidator(readings.SUITE)

    def run() -> None:
        verdicts = [validator.split(block) for block in blocks]
        rejected = pa.concat_tables([v.rejected for v in verdicts])
        assert sum(v.accepted.num_rows for v in verdicts) + rejected.num_rows == table.num_rows
        found = rejected.select(["_row_id", "_reasons"]).to_pylist()
        (place.folder / "ours.json").write_text(json.dumps(found), encoding="utf-8")

    return run


def open_gx(place: Place) -> Run:
    """Great Expectations, every row number asked for."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    frame = pq.read_table(place.folder / "rows.parquet").to_pandas()
    frame["taken_at"] = frame["taken_at"].dt.tz_localize(None)
    rules = [
        ExpectationConfiguration(type=r["type"], kwargs=r["kwargs"], meta={"number": i}).to_domain_obj()
        for i, r in enumerate(readings.RULES)
    ]
    suite = gx.ExpectationSuite(name="readings", expectations=rules)
    whole = context.data_sources.add_pandas("rows").add_dataframe_asset("all").add_batch_definition_whole_dataframe("w")

    def run() -> None:
        batch = whole.get_batch({"dataframe": frame})
        result = batch.validate(suite, result_format={"result_format": "COMPLETE"})
        found = {
            _NAMES[r.expectation_config.meta["number"]]: sorted(map(int, r.result["unexpected_index_list"] or []))
            for r in result.results
        }
        (place.folder / "gx.json").write_text(json.dumps(found), encoding="utf-8")

    return run


def check(place: Place) -> None:
    """All three reject the same rows by the same rules."""

    def read(name: str) -> object:
        return json.loads((place.folder / f"{name}.json").read_text(encoding="utf-8"))

    theirs: dict[str, list[str]] = {}
    for name, positions in read("gx").items():  # type: ignore[attr-defined]
        for at in positions:
            theirs.setdefault(f"r{at}", []).append(name)
    limit = {row["_row_id"]: row["reasons"] for row in read("limit")}  # type: ignore[attr-defined]
    ours = {row["_row_id"]: row["_reasons"] for row in read("ours")}  # type: ignore[attr-defined]
    assert len(ours) == sum(readings.is_invalid(i) for i in range(place.size))
    assert {row: sorted(names) for row, names in theirs.items()} == {row: sorted(names) for row, names in limit.items()}
    assert {row: len(names) for row, names in theirs.items()} == {row: len(reasons) for row, reasons in ours.items()}


CASE = Case(
    title="ten expectations over rows in memory, the rows that break one split off with all reasons",
    unit="s",
    sizes=(1_000_000, 100_000),
    size_unit="rows",
    goal="≤ 1.5 times the polars expressions",
    make=make,
    check=check,
    contenders={"limit": open_limit, "ours": open_ours, "Great Expectations, COMPLETE": open_gx},
    packages=("polars", "pyarrow", "great-expectations", "pandas"),
)
