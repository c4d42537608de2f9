"""``airflow ai …`` through Airflow's own parser: what it prints, and its exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.cli import get_cli_commands
from airflow_ai_provider.core.batch import Pin
from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.store import Store
from tests.core.pipeline.story_world import PIPELINE, RUN, make_world, row_id

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
EXAMPLES = GOLDEN.parents[1] / "dags" / "pipelines"


@pytest.fixture
def world(stored: tuple[Store, Ledger]) -> dict[str, Any]:
    """A finished run behind the default connections."""
    return make_world(*stored)


def test_airflow_finds_the_commands_by_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "airflow", "ai", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("lint", "plan", "explain", "quarantine", "claims", "pins"))


def test_listing_the_commands_loads_nothing_of_ours() -> None:
    code = (
        "import sys; from airflow_ai_provider.cli import get_cli_commands; get_cli_commands();"
        "print(sorted(m for m in sys.modules if m.startswith('airflow_ai_provider')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.strip().splitlines()[-1]
    assert "airflow_ai_provider.cli.quarantine" in loaded
    assert not any(part in loaded for part in (".core", ".hooks", ".operators", ".dag_factory"))


def test_every_command_says_what_it_is_for() -> None:
    (group,) = get_cli_commands()
    commands = [inner for command in group.subcommands for inner in getattr(command, "subcommands", [command])]
    for command in [*commands, *group.subcommands]:
        assert command.help
        assert command.description
        assert all(arg.kwargs.get("help") for arg in getattr(command, "args", ()))


def test_lint_lists_all_faults_of_all_files(ai: Any) -> None:
    status, out, _ = ai("lint", str(GOLDEN / "typos.faults.yaml"), str(GOLDEN / "tab.faults.yaml"))
    assert status == 1
    assert "typos.faults.yaml has" in out
    assert "line 1: scedule: is not a key here; did you mean 'schedule'?" in out
    assert "line 2: a tab stands where only spaces may" in out
    assert out.strip().splitlines()[-1].startswith("2 files, ")


def test_lint_passes_the_examples_and_finds_their_files(ai: Any) -> None:
    status, out, _ = ai("lint", str(EXAMPLES))
    assert status == 0
    assert "0 faults" in out
    assert "not found" not in out


def test_lint_warns_and_strict_makes_it_fail(ai: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "ingest: {kafka: t, key: id, expectations: absent.json}\ninfer: {model: m@a}\n"
        "decide: {act: 0.9, review: 0.9}\nact:\n  - a: {post: /a, json: absent.j2}\n  - b: {post: /b}\n"
    )
    status, out, _ = ai("lint", str(file))
    assert status == 0
    for words in (
        "ingest.max_rejected",
        "decide.review: equals act",
        "act[0].a.undo: has no undo",
        "absent.j2' not found",
    ):
        assert words in out
    assert ai("lint", "--strict", str(file))[0] == 1
    findings = [json.loads(line) for line in ai("lint", "--json", str(file))[1].splitlines()]
    assert {finding["level"] for finding in findings} == {"warning"}


def test_lint_names_what_is_not_there(ai: Any, tmp_path: Path) -> None:
    status, out, _ = ai("lint", str(tmp_path / "absent.yaml"))
    assert status == 1
    assert "cannot be read" in out


def test_plan_shows_the_tasks(ai: Any) -> None:
    status, out, _ = ai("plan", str(EXAMPLES / "tumour_triage.yaml"))
    assert status == 0
    assert out == (GOLDEN / "tumour_triage.plan.txt").read_text(encoding="utf-8")
    as_json = json.loads(ai("plan", "--json", str(EXAMPLES / "tumour_triage.yaml"))[1])
    assert as_json == json.loads((GOLDEN / "tumour_triage.plan.json").read_text(encoding="utf-8"))


def test_plan_of_a_faulty_file_is_its_faults_without_a_traceback(ai: Any) -> None:
    status, out, err = ai("plan", str(GOLDEN / "missing.faults.yaml"))
    assert (status, out) == (1, "")
    assert "ingest: is missing" in err


def test_explain_goes_from_the_action_to_the_offset(ai: Any, world: dict[str, Any]) -> None:
    status, out, _ = ai("explain", "--pipeline", PIPELINE, "--subject", "B-0")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == f"{row_id(0)}  in run {RUN}"
    assert lines[1].startswith("  action    ticket: compensated, ")
    assert lines[2].startswith("  action    ticket (undo): done, status 204")
    assert lines[3] == "  decision  act: confidence 0.97 ≥ act 0.90; model decided malignant"
    assert lines[4] == "  bar       confidence 0.97, bar 0.9"
    assert lines[5].startswith("  model     triage version 3 (alias champion), sha256:ab; predicted malignant")
    assert "offset 0" in lines[-1]
    assert "benign → malignant by anna" in ai("explain", "--pipeline", PIPELINE, "--row", row_id(1))[1]
    story = json.loads(ai("explain", "--pipeline", PIPELINE, "--subject", "B-0", "--json")[1])
    assert story["actions"][0]["outcome"]["id"] == "T-7"


def test_explain_says_when_there_is_nothing(ai: Any, world: dict[str, Any]) -> None:
    status, out, err = ai("explain", "--pipeline", PIPELINE, "--subject", "B-99")
    assert (status, out) == (1, "")
    assert "B-99 was not found" in err
    assert ai("explain", "--pipeline", PIPELINE)[0] == 1


def test_pins_are_listed_with_window_policy_and_version(ai: Any, stored: tuple[Store, Ledger]) -> None:
    ledger = stored[1]
    window = (datetime(2026, 11, 1, 10, tzinfo=UTC), datetime(2026, 11, 1, 11, tzinfo=UTC))
    for pipeline, version in (("p", "3"), ("other", "4")):
        pin = Pin("triage", version, "champion", f"sha256:{version * 64}", {"m": "sha256:f"}, "onnx", {"inputs": []})
        ledger.pin(pipeline, "run-1", pin, window, "as_run")
    status, out, err = ai("pins", "triage")
    assert (status, "2 pins of triage" in err) == (0, True)
    assert "2026-11-01T10:00:00  2026-11-01T11:00:00  as_run  champion  3        sha256:333333333333" in out
    (line,) = ai("pins", "triage", "--pipeline", "other", "--format", "json")[1].splitlines()
    assert (json.loads(line)["version"], json.loads(line)["pipeline"]) == ("4", "other")
    assert ai("pins", "nobody")[1] == ""


_CHATTY = """
from argparse import Namespace
from airflow_ai_provider.cli.terminal import command
command(lambda args: print("x\\n" * 100_000) or 0)(Namespace())
"""


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    chatty = subprocess.Popen(
        [sys.executable, "-c", _CHATTY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert chatty.stdout is not None and chatty.stderr is not None
    assert chatty.stdout.readline() == "x\n"
    chatty.stdout.close()
    assert "BrokenPipe" not in chatty.stderr.read()
    chatty.stderr.close()
    assert chatty.wait(120) == 128 + signal.SIGPIPE
