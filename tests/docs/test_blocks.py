"""Every block in the documents that claims to run is run."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import airflow_ai_provider as provider
from airflow_ai_provider.core.pipeline.plan import plan
from airflow_ai_provider.core.pipeline.render import render
from airflow_ai_provider.core.pipeline.spec import load_spec, parse_spec
from tests.docs.pages import LANGUAGES, ROOT, Block, blocks

MINIMAL = {"ingest": {"kafka": "rows"}, "infer": {"model": "m@champion"}, "decide": {"act": 0.9, "review": 0.5}}
# Commands that the documents may use besides airflow's, which are parsed, and make's, which must be targets.
OTHER_COMMANDS = {"openssl", "pip"}


def ids(found: list[Block]) -> list[str]:
    return [str(block) for block in found]


def of(language: str) -> Any:
    found = blocks(language)
    assert found, f"no {language} block was found: the test would prove nothing"
    return pytest.mark.parametrize("block", found, ids=ids(found))


def test_every_block_is_in_a_language_that_a_test_here_knows() -> None:
    assert not [str(block) for block in blocks() if block.language not in LANGUAGES]


# --- python ---


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_dag_file(block: Block, folder: Path) -> list[Any]:
    """Put a block into a dags folder and return what Airflow finds there."""
    from airflow.dag_processing.dagbag import DagBag

    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "from_file.yaml").write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    (folder / "dag_file.py").write_text(block.text, encoding="utf-8")
    # in safe mode, as the DAG processor does: it passes over files that do not look like DAG files
    bag = DagBag(folder, safe_mode=True)
    assert not bag.import_errors, bag.import_errors
    return list(bag.dags.values())


def given(dag: Any) -> dict[str, Any]:
    """What a piece of a DAG may use: the face of the provider, and tasks that were written before it."""
    names = {name: getattr(provider, name) for name in provider.__all__}
    new = {
        "pin": provider.PinModelOperator(task_id="given_pin", model="m@a", dag=dag),
        "batch": provider.ValidatedIngestOperator(
            task_id="given_ingest", source=provider.KafkaSource("rows", key="id"), dag=dag
        ),
    }
    new["scored"] = provider.BatchInferenceOperator(
        task_id="given_infer", batch=new["batch"].output, model=new["pin"].output, dag=dag
    )
    new["routes"] = provider.ConfidenceBranchOperator(
        task_id="given_decide", predictions=new["scored"].output, policy=provider.Policy(0.9, 0.5), dag=dag
    )
    new["review"] = provider.ReviewOperator(
        task_id="given_review", rows=new["routes"].output["review"], response_timeout=timedelta(hours=1), dag=dag
    )
    new["ticket"] = provider.ApiActionOperator(
        task_id="given_ticket", rows=new["routes"].output["act"], endpoint="/t", dag=dag
    )
    return {**names, **new, "timedelta": timedelta, "__name__": "piece"}


def is_dag_file(block: Block) -> bool:
    calls = (node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call))
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return "DAG" in names or {"globals", "load_pipelines"} <= names


@of("python")
def test_python_runs(block: Block, home: Path) -> None:
    if is_dag_file(block):
        made = run_dag_file(block, home)
        assert made and all(dag.tasks for dag in made)
        for dag in made:
            assert_survives_the_scheduler(dag)
    elif "Operator(" in block.text:
        assert_survives_the_scheduler(run_piece(block))
    else:
        names = {name: getattr(provider, name) for name in ("KafkaSource", "FileSource")}
        exec(compile(block.text, str(block), "exec"), {**names, "__name__": "script", "__file__": str(home / "x.py")})


def run_piece(block: Block) -> Any:
    from airflow.sdk import DAG

    with DAG("piece", schedule=None) as dag:
        values = given(dag)
        before = set(dag.task_ids)
        exec(compile(block.text, str(block), "exec"), values)
    assert set(dag.task_ids) - before, "the piece added no task"
    return dag


def assert_survives_the_scheduler(dag: Any) -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    dag.check_cycle()
    data = DagSerialization.to_dict(dag)
    again = DagSerialization.from_dict(json.loads(json.dumps(data)))
    assert sorted(again.task_ids) == sorted(dag.task_ids)


# --- yaml ---


@of("yaml")
def test_yaml_is_a_pipeline_or_a_piece_of_one(block: Block) -> None:
    data = yaml.safe_load(block.text)
    if set(MINIMAL) <= set(data):
        text = block.text
    else:
        whole = MINIMAL | data
        if any("review" in step.get("rows", []) for item in data.get("act", []) for step in item.values()):
            whole = {"review": {"timeout": "4h"}} | whole
        text = yaml.safe_dump(whole, sort_keys=False)
    spec = parse_spec(text, "piece")
    assert render(plan(spec))


def readme(language: str, holding: str) -> Block:
    (found,) = [b for b in blocks(language) if b.page == "README.md" and holding in b.text]
    return found


def test_ten_lines_of_python_and_ten_lines_of_yaml_make_the_same_dag(home: Path) -> None:
    from airflow_ai_provider import build_dag

    python, text = readme("python", "with DAG("), readme("yaml", "ingest:")
    assert len(python.text.partition("with DAG(")[2].splitlines()) == 10
    assert len(text.text.splitlines()) == 10
    (by_hand,) = run_dag_file(python, home)
    (home / "triage.yaml").write_text(text.text, encoding="utf-8")
    from_file = build_dag(plan(load_spec(home / "triage.yaml")))
    assert shape(by_hand) == shape(from_file)
    assert by_hand.dag_id == from_file.dag_id
    assert by_hand.timetable == from_file.timetable
    assert by_hand.max_active_runs == from_file.max_active_runs


def shape(dag: Any) -> dict[str, Any]:
    """Each task's operator, the tasks before it, and when it runs."""
    return {t.task_id: (type(t).__name__, sorted(t.upstream_task_ids), str(t.trigger_rule)) for t in dag.tasks}


# --- json, jinja, sql ---


@of("json")
def test_json_is_what_it_claims_to_be(block: Block, tmp_path: Path) -> None:
    from airflow_ai_provider.core.ingest.correction import read_corrections
    from airflow_ai_provider.core.ingest.suite import load_suite

    data = json.loads(block.text)
    if "expectations" in data:
        assert load_suite(data).rules
    elif "chosen_options" in data:
        from airflow_ai_provider.operators import decide

        assert set(data["chosen_options"]) <= {decide.APPLY, decide.HOLD_ALL}
    else:
        (tmp_path / "corrections").write_text(block.text, encoding="utf-8")
        assert read_corrections(tmp_path / "corrections").row_ids


def test_the_suite_in_the_documents_is_one_that_great_expectations_knows() -> None:
    from airflow_ai_provider.core.ingest.validate import GxValidator

    suites = [data for block in blocks("json") if "expectations" in (data := json.loads(block.text))]
    assert suites
    for suite in suites:
        assert GxValidator(suite).schema


@of("jinja")
def test_a_template_prints_json(block: Block) -> None:
    from airflow_ai_provider.core.act.template import open_template

    run = {"pipeline": "p", "run_id": "r", "action": "a", "model": {"name": "triage", "version": "3"}}
    body = open_template("a", block.text, run)({"_row_id": "1", "biopsy_id": 'B"1', "decision": "benign"})
    assert body["subject"] == 'B"1' and "version 3" in body["model"]


@pytest.fixture(scope="module")
def ledger_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from airflow_ai_provider.core.ledger_sql import open_ledger

    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    open_ledger(f"sqlite:///{path}")
    return path


@of("sql")
def test_sql_runs_on_the_ledger(block: Block, ledger_file: Path) -> None:
    with closing(sqlite3.connect(ledger_file)) as connection:
        for statement in filter(str.strip, block.text.split(";")):
            connection.execute(statement)


def test_the_ledgers_tables_are_those_of_the_document(ledger_file: Path) -> None:
    with closing(sqlite3.connect(ledger_file)) as connection:
        found = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'ai\\_%' ESCAPE '\\'"
        )
        tables = {name for (name,) in found}
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert tables == set(re.findall(r"`(ai_\w+)`", page.partition("## The ledger's tables")[2].partition("```")[0]))


# --- commands ---


def commands() -> Iterator[tuple[str, str]]:
    """Every command of the documents with its place: lines of bash blocks, and ``airflow …`` within a line."""
    for block in blocks("bash"):
        for line in block.text.splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield str(block), line
    for page in {ROOT / block.page for block in blocks()}:
        for match in re.findall(r"`((?:airflow|make) [^`\n]+)`", page.read_text(encoding="utf-8")):
            yield page.name, match


@pytest.fixture(scope="module")
def parser() -> Any:
    from airflow.cli.cli_parser import get_parser

    return whole_flags_only(get_parser())


def whole_flags_only(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Refuse ``--reproc`` for ``--reprocess-behavior``: the next release may have two flags that begin so."""
    parser.allow_abbrev = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                whole_flags_only(inner)
    return parser


def test_every_airflow_command_is_one_with_these_flags(parser: Any) -> None:
    tried, faults = 0, []
    for place, command in commands():
        words = shlex.split(command, comments=True)
        if words[0] != "airflow":
            continue
        tried += 1
        if len(words) == 3 and words[1] in ("ai", "connections"):  # named, not written out
            words.append("--help")
        try:
            parser.parse_args(words[1:])
        except SystemExit as stop:
            if stop.code:
                faults.append(f"{place}: {command}")
    assert tried > 10
    assert not faults
    with pytest.raises(SystemExit):
        parser.parse_args(["backfill", "create", "--dag-id", "x", "--reproc", "completed"])


def test_every_other_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    extras = set(re.findall(r"^([a-z0-9-]+) =$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE))
    for place, command in commands():
        words = [word for word in shlex.split(command, comments=True) if "=" not in word and word != "…"]
        if words[0] == "make":
            assert set(words[1:]) <= targets, f"{place}: {command}"
        elif words[0] == "pip":
            named = re.findall(r"\[([\w,-]+)\]", command)
            assert named and set(named[0].split(",")) <= extras, f"{place}: {command}"
        elif words[0] == "python":
            assert words[1] == "-m" and (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), f"{place}: {command}"
        else:
            assert words[0] in {"airflow", *OTHER_COMMANDS}, f"{place}: {command}"
