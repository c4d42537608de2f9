"""The commands ``airflow ai …``: lint and plan pipeline files, explain a decision, browse a quarantine.

Invariants: every command only reads; importing this loads no library of ours (each ``airflow`` command imports it);
an error is one message and exit status 1, without a traceback; what came from outside cannot control the terminal.
"""

from __future__ import annotations

import base64
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from airflow.cli.cli_config import ActionCommand, Arg, CLICommand, GroupCommand

from airflow_ai_provider.errors import AiProviderError, SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.batch import BatchRef
    from airflow_ai_provider.core.ledger import Entry
    from airflow_ai_provider.core.pipeline.explain import Story
    from airflow_ai_provider.core.pipeline.spec import Spec
    from airflow_ai_provider.core.store import Store

_arg: Callable[..., Arg] = Arg  # untyped in Airflow
_JSON = _arg(("--json",), help="Print JSON, one object a line", action="store_true")
_PIPELINE = _arg(("--pipeline",), help="DAG id of the pipeline")


def get_cli_commands() -> list[CLICommand]:
    """Return the commands, as Airflow's provider discovery asks for them."""
    return [
        GroupCommand(
            name="ai",
            help="Lint, plan and explain AI pipelines",
            description="Read-only commands of the provider airflow-ai-provider.",
            subcommands=(_lint_command(), _plan_command(), _explain_command(), _quarantine_command()),
        )
    ]


def _lint_command() -> ActionCommand:
    return ActionCommand(
        name="lint",
        help="List all faults of pipeline files, and what is unsafe in them",
        description="Check pipeline files. Exit status 1 when any has a fault (with --strict: or a warning).",
        func=lint,
        args=(
            _arg(("path",), nargs="*", help="YAML files or folders; without any: pipelines/ of the dags folder"),
            _arg(("--strict",), help="Fail on warnings too", action="store_true"),
            _JSON,
        ),
    )


def _plan_command() -> ActionCommand:
    return ActionCommand(
        name="plan",
        help="Show the tasks that a pipeline file becomes",
        description="Show tasks, flow of rows and trigger form of a pipeline file, without running anything.",
        func=show_plan,
        args=(_arg(("path",), help="YAML file"), _JSON),
    )


def _explain_command() -> ActionCommand:
    return ActionCommand(
        name="explain",
        help="Explain what was done for a row or a subject, back to its offset",
        description="Action, decision, confidence and bar, model version, row and offset, from ledger and store.",
        func=explain,
        args=(
            _arg(("--pipeline",), help="DAG id of the pipeline", required=True),
            _arg(("--row",), help="Row id, such as biopsies~a1b2c3d4/0/17"),
            _arg(("--subject",), help="Value of the pipeline's key column, such as B-17"),
            _arg(("--run",), help="Look in this run only (needed for a row of a run that acted on nothing)"),
            *_connections(),
            _JSON,
        ),
    )


def _quarantine_command() -> ActionCommand:
    return ActionCommand(
        name="quarantine",
        help="Browse the rejected rows of a batch with their reasons",
        description="Counts by reason, then rows with reasons and payload.",
        func=quarantine,
        args=(
            _arg(("batch",), help="URI of the batch, or its id together with --pipeline"),
            _PIPELINE,
            _arg(("--reason",), help="Only rows with a reason of this code, such as out_of_range"),
            _arg(("--limit",), help="Rows to print (default 20; 0 prints all)", type=int, default=20),
            *_connections()[:1],
            _JSON,
        ),
    )


def _connections() -> tuple[Arg, Arg]:
    return (
        _arg(("--store-conn-id",), help="Connection of the store", default="ai_store_default"),
        _arg(("--ledger-conn-id",), help="Connection of the ledger", default="ai_ledger_default"),
    )


def _command(work: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """Make a command of a function that returns the exit status."""

    @wraps(work)
    def run(args: Namespace) -> None:
        try:
            status = work(args)
        except AiProviderError as error:
            print(_plain(str(error)), file=sys.stderr)
            status = 1
        if status:
            raise SystemExit(status)

    return run


@_command
def lint(args: Namespace) -> int:
    """Check pipeline files."""
    from airflow_ai_provider.core.pipeline.spec import load_spec

    findings: list[dict[str, str]] = []
    paths = list(_pipeline_files(args.path))
    for path in paths:
        try:
            spec = load_spec(path)
            found = [("warning", place, text) for place, text in _warnings(spec)]
        except SpecError as error:
            found = [("fault", place, text) for place, text in error.faults]
            if not args.json:
                print(_plain(str(error)))
        findings += [{"file": str(path), "level": level, "path": p, "text": text} for level, p, text in found]
    for finding in findings:
        if args.json:
            print(json.dumps(finding, ensure_ascii=False))
        elif finding["level"] == "warning":
            print(_plain(f"{finding['file']}: warning: {finding['path']}: {finding['text']}"))
    faults = sum(finding["level"] == "fault" for finding in findings)
    warnings = len(findings) - faults
    if not args.json:
        print(f"{_count(len(paths), 'file')}, {_count(faults, 'fault')}, {_count(warnings, 'warning')}")
    return 1 if faults or (args.strict and warnings) else 0


def _pipeline_files(given: list[str]) -> Iterator[Path]:
    from airflow.sdk import conf

    for path in map(Path, given or [f"{conf.get('core', 'dags_folder')}/pipelines"]):
        if path.is_dir():
            yield from sorted(path.glob("*.yaml"))
        elif path.exists() or given:
            yield path  # a file that is not there is a fault of its own
        else:
            raise SpecError(f"there is no folder {path}. Name the files or folders to check.", faults=[])


def _warnings(spec: Spec) -> Iterator[tuple[str, str]]:
    from airflow_ai_provider.core.pipeline.lint import find_warnings
    from airflow_ai_provider.run import find_file

    yield from find_warnings(spec)
    place = SimpleNamespace(template_searchpath=[str(Path(spec.path).resolve().parent)], fileloc=spec.path)
    files = [("ingest.expectations", spec.sections.ingest.expectations, "expectations")]
    files += [(f"act[{at}].{name}.json", step.body, "templates") for at, (name, step) in enumerate(spec.steps)]
    for path, name, folder in files:
        if name is not None and "{{" not in name:
            try:
                find_file(place, name, folder)
            except SpecError as error:
                yield path, str(error)


@_command
def show_plan(args: Namespace) -> int:
    """Show what a pipeline file becomes."""
    from airflow_ai_provider.core.pipeline.plan import plan
    from airflow_ai_provider.core.pipeline.render import render
    from airflow_ai_provider.core.pipeline.spec import load_spec

    made = plan(load_spec(args.path))
    print(json.dumps(made.to_dict(), ensure_ascii=False) if args.json else _plain(render(made)))
    return 0


@_command
def explain(args: Namespace) -> int:
    """Explain what was done, and why."""
    from airflow_ai_provider.core.pipeline.explain import explain as tell
    from airflow_ai_provider.hooks.ledger import LedgerHook
    from airflow_ai_provider.hooks.store import StoreHook

    stories = tell(
        LedgerHook(args.ledger_conn_id).get_ledger(),
        StoreHook(args.store_conn_id).get_store(),
        args.pipeline,
        row_id=args.row or "",
        subject=args.subject or "",
        run_ids=[args.run] if args.run else [],
    )
    for story in stories:
        print(json.dumps(vars(story), ensure_ascii=False, default=_as_json) if args.json else _plain(_tell(story)))
    if not stories:
        where = f"run {args.run}" if args.run else "the runs that acted on something; give --run to look in another"
        print(_plain(f"{args.row or args.subject} was not found in {where}."), file=sys.stderr)
    return 0 if stories else 1


def _tell(story: Story) -> str:
    lines = [f"{story.row_id}  in run {story.run_id}"]
    for entry in story.actions:
        lines.append(f"  action    {_entry(entry)}")
    if story.review:
        r = story.review
        lines.append(f"  review    {r['before']} → {r['after']} by {r['responder']} at {r['at']}")
    if story.decision:
        d = story.decision
        decided = f"; {d['decided_by']} decided {d['decision']}" if d["decided_by"] else ""
        lines += [f"  decision  {d['route']}: {d['reason']}{decided}"]
        lines += [f"  bar       confidence {d['confidence']}, bar {d['bar']}"]
    if story.fate:
        lines.append(f"  end       {story.fate}")
    if story.model:
        m = story.model
        said = f"; predicted {m['prediction']}, score {m['score']}" if "prediction" in m else ""
        alias = f" (alias {m['alias']})" if m["alias"] else ""
        lines.append(f"  model     {m['name']} version {m['version']}{alias}, {m['digest']}{said}")
    lines.append("  row       " + _pairs(story.row))
    lines.append("  origin    " + _pairs(story.origin))
    return "\n".join(lines)


def _entry(entry: Entry) -> str:
    undo = " (undo)" if entry.undoes else ""
    answer = _pairs(entry.outcome)
    return (
        f"{entry.action}{undo}: {entry.state}{f', {answer}' if answer else ''}; tries {entry.attempts}, key {entry.key}"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items() if value is not None)


@_command
def quarantine(args: Namespace) -> int:
    """Browse the rejected rows of a batch."""
    from airflow_ai_provider.hooks.store import StoreHook

    store = StoreHook(args.store_conn_id).get_store()
    ref = _find_batch(store, args.batch, args.pipeline)
    manifest = store.manifest(ref)
    if not args.json:
        print(_plain(f"{ref.batch_id}: {_pairs(manifest.counts)}"))
        for code, count in sorted((manifest.facts.get("reasons") or {}).items(), key=lambda item: -item[1]):
            print(_plain(f"{count:>8}  {code}"))
    for row in islice(_quarantined(store, ref, args.reason), args.limit or None):
        if args.json:
            print(json.dumps(row, ensure_ascii=False, default=_as_json))
        else:
            print(_plain(f"{row['_row_id']}  {row['_stage']}: {'; '.join(row['_reasons'] or [])}"))
            print(_plain(f"          {_text(row['_payload'])[:200]}"))
    return 0


def _find_batch(store: Store, batch: str, pipeline: str | None) -> BatchRef:
    pieces = batch.rstrip("/").removesuffix("/manifest.json").split("/")
    if len(pieces) > 2 and pieces[-2] == "batch":
        pipeline = pieces[-3]
    if not pipeline:
        raise SpecError(f"{batch!r} is no URI of a batch. Give the URI, or --pipeline beside the batch id.", faults=[])
    ref = store.find(pipeline, "batch", pieces[-1])
    if ref is None:
        raise SpecError(f"there is no batch {pieces[-1]!r} of pipeline {pipeline!r} in {store.root}.", faults=[])
    return ref


def _quarantined(store: Store, ref: BatchRef, code: str | None) -> Iterator[dict[str, Any]]:
    for table in store.read(ref, "quarantine"):
        for row in table.to_pylist():
            if code is None or any(reason.partition(":")[0] == code for reason in row["_reasons"] or []):
                yield row


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value if isinstance(value, str) else str(value)


def _plain(text: str) -> str:
    """Show control characters instead of sending them: a payload must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return vars(value) if hasattr(value, "__dataclass_fields__") else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
