"""The spec: defaults, what each kind of value may be, and that loading stays cheap."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.core.pipeline.section import read_duration
from airflow_ai_provider.core.pipeline.spec import Spec, load_spec, parse_spec
from airflow_ai_provider.errors import SpecError

LEAST = "ingest: {kafka: t}\ninfer: {model: m@a}\ndecide: {act: 0.9, review: 0.5}\n"


def parse(more: str = "", without: str = "") -> Spec:
    kept = "".join(line for line in LEAST.splitlines(True) if not (without and line.startswith(without)))
    return parse_spec(kept + more, "p")


def faults(more: str = "", without: str = "") -> list[tuple[str, str]]:
    with pytest.raises(SpecError) as caught:
        parse(more, without)
    return caught.value.faults


def test_defaults_are_the_safe_ones() -> None:
    spec = parse()
    s = spec.sections
    assert (s.schedule, s.catchup, s.max_active_runs, s.start_date) == (None, False, 1, None)
    assert spec.policy == Policy(0.9, 0.5, "hold")
    assert spec.steps == ()
    assert parse("act:\n  - t: {post: /t}").steps[0][1].max_refused == 0


def test_the_file_name_is_the_dag_id(tmp_path: Path) -> None:
    path = tmp_path / "tumour_triage.yaml"
    path.write_text(LEAST)
    assert load_spec(path).dag_id == "tumour_triage"
    assert load_spec(str(path)) == load_spec(path)
    with pytest.raises(SpecError, match="cannot be a DAG id"):
        parse_spec(LEAST, "my pipeline")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9\n")
    with pytest.raises(SpecError, match="cannot be read"):
        load_spec(tmp_path / "latin.yaml")


def test_a_step_acts_on_everything_that_is_decided_unless_it_says_which() -> None:
    step = "act:\n  - t: {post: /t}\n"
    rule = "decide: {act: 0.9, review: 0.5, fallback: {rule: x > 1, then: a, else: b}}\n"

    def rows(text: str, without: str = "") -> tuple[str, ...]:
        spec = parse(text, without)
        return spec.rows_of(spec.steps[0][1])

    assert rows(step) == ("act",)
    assert rows(step + "review: {timeout: 1h}\n") == ("act", "review")
    assert rows(step + rule + "review: {timeout: 1h}\n", "decide") == ("act", "review", "fallback")
    assert rows(rule + "act:\n  - t: {post: /t, rows: [fallback]}\n", "decide") == ("fallback",)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("4h", 14400), ("1h30m", 5400), ("2d", 172800), ("1w", 604800)]
)
def test_durations(text: str, seconds: int) -> None:
    assert read_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "4", "h", "4 h", "-4h", "0s", "1.5h", "4h!", 240, None, True, "9999d"])
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="is not"):
        read_duration(text)


@pytest.mark.parametrize("limit", ["20%", "0%", "100%", "0.5", 0.2, 0, 50, "50"])
def test_limits_are_kept_as_written(limit: object) -> None:
    ingest = f"ingest: {{kafka: t, max_rejected: {limit!r}}}\n"
    assert parse(ingest, "ingest").sections.ingest.max_rejected == limit


@pytest.mark.parametrize(
    "schedule", ["@daily", "0 3 * * *", "*/5 0-6 1,15 * MON-FRI", "0 0 L * ?", "0 0 * * 5#2", "1 2 3 4 5 6"]
)
def test_schedules(schedule: str) -> None:
    assert parse(f"schedule: '{schedule}'\n").sections.schedule == schedule


@pytest.mark.parametrize("schedule", ["@never", "daily", "* * *", "every hour on sundays maybe", "5", ""])
def test_what_is_no_schedule(schedule: str) -> None:
    assert [path for path, _ in faults(f"schedule: '{schedule}'\n")] == ["schedule"]


@pytest.mark.parametrize("date", ["2026-02-01", "'2026-02-01'", "2026-02-01T00:00:00Z", "'2026-02-01T00:00:00+00:00'"])
def test_start_dates_are_in_utc(date: str) -> None:
    assert parse(f"start_date: {date}\n").sections.start_date == datetime(2026, 2, 1, tzinfo=UTC)


def test_yaml_11_traps_do_not_become_values() -> None:
    # yes is a bool, 010 an octal and 1:30 a number of base 60 to YAML: none may pass as what it was not meant to be
    assert faults("owner: yes\n")[0][0] == "owner"
    assert faults("tags: [no]\n")[0][0] == "tags[0]"
    assert faults("review: {timeout: 1:30}\n")[0][0] == "review.timeout"
    assert faults("catchup: 1\n")[0][0] == "catchup"


def test_a_topic_may_be_templated() -> None:
    assert (
        parse("ingest: {kafka: '{{ var.value.topic }}'}\n", "ingest").sections.ingest.kafka == "{{ var.value.topic }}"
    )


def test_no_fault_hides_another() -> None:
    found = faults(
        "decide: {act: high, review: 0.5, otherwise: fallback}\n"
        "review: {timeout: soon}\n"
        "act:\n  - infer: {json: '', rows: [act, act]}\n",
        "decide",
    )
    assert sorted(path for path, _ in found) == [
        "act[0].infer",  # the name of another task
        "act[0].infer",  # no call
        "act[0].infer.json",
        "act[0].infer.rows",
        "decide.act",
        "decide.fallback",
        "review.timeout",
    ]


def test_recursive_and_repeated_aliases_end() -> None:
    assert faults("tags: &t [*t]\n")[0][0] == "tags[0]"
    anchored = "review: &r {timeout: 4h}\nact:\n  - a: &s {post: /a}\n  - b: *s\n"
    assert [name for name, _ in parse(anchored).steps] == ["a", "b"]


def test_loading_costs_airflow_nothing_new() -> None:
    code = (
        "import sys; import airflow.sdk; from airflow.sdk import DAG; before = set(sys.modules);"
        "from airflow_ai_provider.core.pipeline import plan, render, spec;"
        "heavy = {'numpy', 'pandas', 'pyarrow', 'sqlalchemy', 'mlflow', 'great_expectations'};"
        "print(sorted(heavy & (set(sys.modules) - before)), 'pydantic' in before, 'yaml' in before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[] True True"


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["kafka", "key", "model", "act", "review", "post", "rows", "rule", "undo"]), inner
        ),
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(["schedule", "tags", "start_date", "ingest", "infer", "decide", "review", "act", "owner", "x"])


@given(st.dictionaries(KEYS, VALUES))
def test_whatever_is_written_is_a_spec_or_a_list_of_faults(data: dict) -> None:
    try:
        parse_spec(yaml.safe_dump(data, allow_unicode=True), "p")
    except SpecError as error:
        assert error.faults
        assert all(isinstance(path, str) and text for path, text in error.faults)


@given(st.text(max_size=60))
def test_whatever_text_is_read_without_surprise(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text, "p")


@pytest.mark.parametrize(
    ("topic", "told"),
    [("my topic", "'my topic' is not a topic name"), ("t", "is the topic that is read")],
)
def test_a_dead_letter_topic_is_a_topic_of_its_own(topic: str, told: str) -> None:
    (found,) = faults(f"ingest: {{kafka: t, dead_letter_topic: {topic}}}\n", without="ingest")
    assert found[0] == "ingest.dead_letter_topic"
    assert told in found[1]
    assert parse("ingest: {kafka: t, dead_letter_topic: t.dead}\n", without="ingest").sections.ingest.dead_letter_topic
