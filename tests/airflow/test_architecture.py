"""Who may import what: floors, siblings, one door per heavy library, and which names of Airflow's.

The tables below are the architecture; the code under them only reads imports. An import counts wherever it stands: at
the top, in a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "airflow_ai_provider"
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / PACKAGE

# Longest prefix wins. An import goes down, or stays within its group. "*": each module below is a group of its own.
FLOORS: dict[str, tuple[int, str]] = {
    "errors": (1, "errors"),
    "provider_info": (1, "provider_info"),
    "core": (2, "core"),
    "retry": (2, "airflow"),
    "run": (2, "airflow"),
    "connection": (2, "airflow"),
    "place": (2, "airflow"),
    "pod": (2, "airflow"),
    "core.ingest": (3, "ingest"),
    "core.infer": (3, "infer"),
    "core.decide": (3, "decide"),
    "core.act": (3, "act"),
    "hooks": (4, "*"),  # a hook opens a verb's door (reader, sender); a verb never knows a hook
    "core.pipeline": (5, "pipeline"),
    "testing": (5, "testing"),
    "operators.source": (5, "source"),  # what ingest in one task and in several share: before it, and behind it
    "operators.landed": (5, "landed"),
    "operators": (6, "*"),
    "triggers": (5, "*"),
    "schedule": (6, "schedule"),
    "dag_factory": (7, "dag_factory"),
    "cli": (7, "cli"),
    "ui": (8, "ui"),
    "": (9, "root"),  # the lazy public face
}
AIRFLOW_FREE = ("errors", "provider_info", "core", "testing")
AIRFLOW_NAMES = ("airflow.sdk", "airflow.providers")
AIRFLOW_NAMES_OF = {
    "ui": ("airflow.plugins_manager", "airflow.api_fastapi"),  # plugin class; the user and the right to see a DAG
    "triggers": ("airflow.triggers.base",),  # what a provider's trigger is made of; not in airflow.sdk
    "schedule": ("airflow.triggers.base",),
    "cli": ("airflow.cli",),  # commands that the provider info registers
}
DOORS: dict[str, set[str]] = {
    # its verdicts, and the page that it draws of them: loaded by whoever has judged
    "great_expectations": {"core.ingest.validate", "core.ingest.data_docs"},
    "kubernetes": {"pod"},
    # what is registered; how it is changed; what only MLflow can open
    "mlflow": {"core.infer.pin", "core.infer.registry", "core.infer.pyfunc"},
    "model_signing": {"core.infer.signing"},
    "onnxruntime": {"core.infer.onnx", "core.infer.quantize"},
    "torch": {"core.infer.torch"},
    "sqlalchemy": {"core.ledger_sql", "core.ledger_query", "core.ledger_engine"},  # what is done and asked, and where
    "pyspark": {"core.infer.spark"},
    "ray": {"core.infer.ray"},
    "polars": set(),
    "aiohttp": {"core.infer.remote.client", "core.act.http"},
    "confluent_kafka": {"core.ingest.kafka", "core.ingest.dead_letter", "core.act.kafka", "hooks.kafka"},
}
# loaded by no DAG file, besides the doors' own libraries
HEAVY = {*DOORS, "numpy", "pandas", "pyarrow"}


@dataclass(frozen=True)
class Import:
    """One imported name, as written in one module."""

    module: str
    target: str
    line: int
    lazy: bool  # inside a function: it costs nothing until called
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target}"


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def _walk(node: ast.AST, lazy: bool = False, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, lazy, typing_only
        guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, lazy or inside, typing_only or guard)


def _imports(module: str, text: str) -> Iterator[Import]:
    for node, lazy, typing_only in _walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import; write the whole name"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(module, target, node.lineno, lazy, typing_only)


IMPORTS = [found for name, path in FILES.items() for found in _imports(name, path.read_text(encoding="utf-8"))]


def _ours(target: str) -> str | None:
    """The module of this package that a target lies in, without the package's name; None for another library's."""
    if target != PACKAGE and not target.startswith(f"{PACKAGE}."):
        return None
    inner = target.removeprefix(PACKAGE).removeprefix(".")
    while inner not in FILES:
        inner = inner.rpartition(".")[0]
    return inner


def _within(module: str, prefix: str) -> bool:
    return prefix == module or module.startswith(f"{prefix}.")


def _floor(module: str) -> tuple[int, str]:
    prefix = max((p for p in FLOORS if p and _within(module, p)), key=len, default="")
    assert prefix or not module, f"{module} stands on no floor: give it one in FLOORS"
    number, group = FLOORS[prefix]
    return number, module if group == "*" else group


def _climbs(found: Import) -> bool:
    target = _ours(found.target)
    if target is None or not found.module or target == found.module:
        return False
    own, other = _floor(found.module), _floor(target)
    return other != own and other[0] >= own[0]


def _wrong_airflow(found: Import) -> bool:
    if not _within(found.target, "airflow"):
        return False
    if any(_within(found.module, prefix) for prefix in AIRFLOW_FREE):
        return True
    own = [names for prefix, names in AIRFLOW_NAMES_OF.items() if _within(found.module, prefix)]
    return not any(_within(found.target, name) for name in [*AIRFLOW_NAMES, *(n for names in own for n in names)])


def _wrong_door(found: Import) -> bool:
    giant = found.target.partition(".")[0]
    return giant in DOORS and (found.module not in DOORS[giant] or found.lazy)


def _opens_early(found: Import) -> bool:
    """A door's module imported at a module's top would load its library with whoever imports that module."""
    doors = set().union(*(doors for doors in DOORS.values() if found.module not in doors))
    return _ours(found.target) in doors and not found.lazy and not found.typing_only


RULES = {
    "an import goes down, or stays in its group": _climbs,
    "core knows no Airflow; the rest only its documented names": _wrong_airflow,
    "a heavy library is imported by its one door, at its top": _wrong_door,
    "a door is opened inside the function that needs it": _opens_early,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    broken = [str(found) for found in IMPORTS if RULES[rule](found)]
    assert not broken, "\n".join([rule, *broken])


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("core.batch", "from airflow_ai_provider.core.ingest import flow", 0),
        ("core.ingest.flow", "from airflow_ai_provider.core.infer.pin import resolve_pin", 0),
        ("hooks.store", "import airflow_ai_provider.hooks.ledger", 0),
        ("operators.infer", "def execute():\n    from airflow_ai_provider.operators.ingest import x", 0),
        ("retry", "from airflow_ai_provider import BatchInferenceOperator", 0),
        ("core.store", "if TYPE_CHECKING:\n    from airflow.sdk import Context", 1),
        ("operators.act", "from airflow.models import DagRun", 1),
        ("hooks.api", "from airflow.api_fastapi.app import create_app", 1),
        ("core.decide.route", "def f():\n    import sqlalchemy.orm", 2),
        ("core.ledger_sql", "def f():\n    import sqlalchemy", 2),
        ("operators.infer", "from airflow_ai_provider.core.infer.pin import resolve_pin", 3),
    ],
)
def test_the_rules_see_what_they_forbid(module: str, line: str, rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("core.ingest.flow", "core.infer.pin", "operators.ingest", "hooks.ledger"):
        monkeypatch.setitem(FILES, name, SOURCE)
    broken = [name for name, breaks in RULES.items() if any(breaks(found) for found in _imports(module, line))]
    assert list(RULES)[rule] in broken


_LOAD = """
import importlib, json, runpy, sys
import airflow_ai_provider
alone = sorted(sys.modules)
import airflow.sdk, airflow.providers.standard.operators.hitl
airflows = set(sys.modules)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
for path in json.loads(sys.argv[2]):
    runpy.run_path(path)
print(json.dumps([alone, sorted(set(sys.modules) - airflows)]))
"""


def test_the_package_operators_and_dag_files_load_nothing_heavy() -> None:
    """In a process of its own; what Airflow itself loads (it brings sqlalchemy) is not counted against us."""
    modules = [f"{PACKAGE}.{name}" for name in FILES if name.partition(".")[0] in {"operators", "triggers"}]
    dags = [str(path) for path in sorted((ROOT / "dags").glob("*.py"))]
    command = [sys.executable, "-c", _LOAD, json.dumps(modules), json.dumps(dags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    alone, later = (set(names) for names in json.loads(done.stdout.splitlines()[-1]))
    assert PACKAGE in alone
    assert set(modules) <= later
    assert not {name.partition(".")[0] for name in alone} & {*HEAVY, "airflow"}
    assert not {name.partition(".")[0] for name in later} & HEAVY
    assert not later & {f"{PACKAGE}.{door}" for doors in DOORS.values() for door in doors}
