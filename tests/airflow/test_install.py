"""What is installed is what setup.cfg asks for: versions against lower bounds, imports against requirements."""

from __future__ import annotations

import ast
import configparser
import sys
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "airflow_ai_provider"
OWN = "airflow-ai-provider"
NOT_TOGETHER = {"onnx-gpu"}  # its wheel installs the same module as onnx


def _requirements() -> dict[str, list[Requirement]]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    groups = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {group: [Requirement(line) for line in text.split("\n") if line] for group, text in groups.items()}


REQUIREMENTS = _requirements()
FOREIGN = {(group, str(r)): r for group, rows in REQUIREMENTS.items() for r in rows if r.name != OWN}


@pytest.mark.parametrize(("group", "text"), FOREIGN)
def test_every_requirement_has_a_lower_bound(group: str, text: str) -> None:
    operators = {clause.operator for clause in FOREIGN[group, text].specifier}
    assert operators & {">=", "==", "~="}, f"{text} in [{group}]: an unbounded requirement can resolve to a decade ago"


@pytest.mark.parametrize("group", sorted(set(REQUIREMENTS) - NOT_TOGETHER - {"bench"}))
def test_what_is_installed_meets_its_bound(group: str) -> None:
    wanted = [requirement for requirement in REQUIREMENTS[group] if requirement.name != OWN]
    found = {requirement.name: version(requirement.name) for requirement in wanted}
    low = [str(r) for r in wanted if not r.specifier.contains(found[r.name], prereleases=True)]
    assert not low, f"installed {found}, but setup.cfg asks for {low}"


def test_the_constraints_hold_versions_only_and_cover_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = [Requirement(line) for line in lines]
    assert all(constraint.url is None and str(constraint.specifier).startswith("==") for constraint in constraints)
    covered = {canonicalize_name(constraint.name) for constraint in constraints}
    wanted = {canonicalize_name(r.name) for (group, _), r in FOREIGN.items() if group not in NOT_TOGETHER}
    assert wanted <= covered


def test_everything_imported_is_asked_for() -> None:
    """A library that only a dependency brings may be gone with that dependency's next release."""
    providers = packages_distributions()
    asked = {canonicalize_name(requirement.name) for requirement in FOREIGN.values()}
    imported: dict[str, str] = {}
    own = [SOURCE, *(ROOT / folder for folder in ("demo", "include", "dags", "benchmarks"))]
    for path in (path for folder in own for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0]: path.name for name in names}
    foreign = set(imported) - sys.stdlib_module_names - {"airflow", "tests", "", *(folder.name for folder in own)}
    unasked = {
        name: imported[name]
        for name in foreign
        if not {canonicalize_name(distribution) for distribution in providers.get(name, [name])} & asked
    }
    assert not unasked, f"imported, but not named in setup.cfg: {unasked}"


def test_airflow_finds_the_provider_and_its_plugin() -> None:
    found = {
        group: [entry.load() for entry in entry_points(group=group) if entry.value.startswith("airflow_ai_provider.")]
        for group in ("apache_airflow_provider", "airflow.plugins")
    }
    (provider_info,) = found["apache_airflow_provider"]
    (plugin,) = found["airflow.plugins"]
    assert provider_info()["package-name"] == OWN
    assert plugin.name == "ai_provider"


def test_the_package_ships_its_pages_and_its_typing_marker() -> None:
    """Every file beside the code has an ending that setup.cfg ships."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    shipped = setup["options.package_data"]["*"].split(", ")
    other = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}]
    assert SOURCE / "py.typed" in other
    assert not [path.name for path in other if not any(path.match(pattern) for pattern in shipped)]
