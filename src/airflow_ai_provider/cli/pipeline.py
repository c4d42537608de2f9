"""``airflow ai lint`` and ``airflow ai plan``: what is wrong with pipeline files, and which tasks they become."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from airflow.cli.cli_config import ActionCommand

from airflow_ai_provider.cli.terminal import JSON, arg, command, count, plain
from airflow_ai_provider.errors import SpecError

if TYPE_CHECKING:
    from airflow_ai_provider.core.pipeline.spec import Spec


def lint_command() -> ActionCommand:
    """Declare ``airflow ai lint``."""
    return ActionCommand(
        name="lint",
        help="List all faults of pipeline files, and what is unsafe in them",
        description="Check pipeline files. Exit status 1 when any has a fault (with --strict: or a warning).",
        func=lint,
        args=(
            arg(("path",), nargs="*", help="YAML files or folders; without any: pipelines/ of the dags folder"),
            arg(("--strict",), help="Fail on warnings too", action="store_true"),
            JSON,
        ),
    )


def plan_command() -> ActionCommand:
    """Declare ``airflow ai plan``."""
    return ActionCommand(
        name="plan",
        help="Show the tasks that a pipeline file becomes",
        description="Show tasks, flow of rows and trigger form of a pipeline file, without running anything.",
        func=show_plan,
        args=(arg(("path",), help="YAML file"), JSON),
    )


@command
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
                print(plain(str(error)))
        findings += [{"file": str(path), "level": level, "path": p, "text": text} for level, p, text in found]
    for finding in findings:
        if args.json:
            print(json.dumps(finding, ensure_ascii=False))
        elif finding["level"] == "warning":
            print(plain(f"{finding['file']}: warning: {finding['path']}: {finding['text']}"))
    faults = sum(finding["level"] == "fault" for finding in findings)
    warnings = len(findings) - faults
    if not args.json:
        print(f"{count(len(paths), 'file')}, {count(faults, 'fault')}, {count(warnings, 'warning')}")
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


@command
def show_plan(args: Namespace) -> int:
    """Show what a pipeline file becomes."""
    from airflow_ai_provider.core.pipeline.plan import plan
    from airflow_ai_provider.core.pipeline.render import render
    from airflow_ai_provider.core.pipeline.spec import load_spec

    made = plan(load_spec(args.path))
    print(json.dumps(made.to_dict(), ensure_ascii=False) if args.json else plain(render(made)))
    return 0
