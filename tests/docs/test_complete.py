"""Nothing public is missing from its page, nothing on a page leads nowhere, and no page names what it must not."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import airflow_ai_provider as provider
from airflow_ai_provider import errors
from airflow_ai_provider.core.pipeline import section
from airflow_ai_provider.provider_info import get_provider_info
from tests.docs.pages import PAGES, ROOT, anchors, blocks, prose, read

DOCS = ROOT / "docs"
PAGE_OF = {
    "ValidatedIngestOperator": "ingest",
    "PlanIngestOperator": "ingest",
    "IngestShardOperator": "ingest",
    "LandBatchOperator": "ingest",
    "PinModelOperator": "pin",
    "BatchInferenceOperator": "infer",
    "GatherPredictionsOperator": "scale",
    "ConfidenceBranchOperator": "decide",
    "ReviewOperator": "review",
    "ApiActionOperator": "act",
    "CompensateOperator": "compensate",
    "ReplayQuarantineOperator": "replay",
    "QuantizeModelOperator": "quantize",
    "FindBatchesOperator": "rescore",
    "PromoteModelOperator": "promote",
}


def own_parameters(operator: type[Any]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(operator.__init__).parameters
    return {n: p for n, p in found.items() if p.kind is p.KEYWORD_ONLY and n != "kwargs"}


def table_rows(page: Path) -> dict[str, list[str]]:
    """First cell (each name in it) → the other cells, over all tables of a page."""
    rows = {}
    for line in prose(page).splitlines():
        if line.startswith("| "):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            for name in re.findall(r"`([\w/]+)`", first):
                rows.setdefault(name, rest)
    return rows


def test_every_operator_has_its_page() -> None:
    assert set(PAGE_OF) == {name for name in provider.__all__ if name.endswith("Operator")}


@pytest.mark.parametrize("name", PAGE_OF)
def test_every_parameter_is_in_its_page_with_its_default(name: str) -> None:
    rows = table_rows(DOCS / f"{PAGE_OF[name]}.md")
    for parameter in own_parameters(getattr(provider, name)).values():
        assert parameter.name in rows, f"{parameter.name} of {name} is not in docs/{PAGE_OF[name]}.md"
        told = rows[parameter.name][0].strip("`").strip('"')
        assert told == ("" if parameter.default is parameter.empty else str(parameter.default)), parameter.name


@pytest.mark.parametrize("kind", [provider.KafkaSource, provider.FileSource], ids=lambda kind: kind.__name__)
def test_every_field_of_a_source_is_in_the_page(kind: type[Any]) -> None:
    said = read(DOCS / "ingest.md")
    assert kind.__name__ in said
    for name in inspect.signature(kind).parameters:
        assert re.search(rf"`{name}`|\b{name}=", said) or name in ("topic",), f"{kind.__name__}.{name}"


def test_every_field_of_a_runner_is_in_its_page_with_its_default() -> None:
    rows = table_rows(DOCS / "infer.md")
    for name, parameter in inspect.signature(provider.Runner).parameters.items():
        assert rows[name][0].strip("`").strip('"') == str(parameter.default), name


def test_every_format_is_in_the_pages() -> None:
    from airflow_ai_provider.core.pipeline.spec import _FORMATS

    for page in ("ingest.md", "pipelines.md"):
        said = read(DOCS / page)
        assert [name for names in _FORMATS.values() for name in names if f"`{name}`" not in said] == []


@pytest.mark.parametrize(
    "kind",
    [
        section.Sections,
        section.WakeUp,
        section.Ingest,
        section.Infer,
        section.Decide,
        section.FallbackRule,
        section.Review,
        section.Step,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_key_of_a_pipeline_file_is_in_the_page(kind: type[section.Section]) -> None:
    said = read(DOCS / "pipelines.md")
    for name, field in kind.model_fields.items():
        assert f"`{field.alias or name}`" in said, f"{kind.__name__}.{name} is not in docs/pipelines.md"


def test_every_param_of_the_trigger_form_is_in_the_page() -> None:
    from airflow_ai_provider.core.pipeline.plan import plan
    from airflow_ai_provider.core.pipeline.spec import parse_spec

    made = plan(parse_spec("{ingest: {kafka: t}, infer: {model: m/1}, decide: {act: 1, review: 0}}", "p"))
    form = read(DOCS / "pipelines.md").partition("## The trigger form")[2]
    assert [name for name in made.params if f"`{name}`" not in form] == []


def test_every_error_is_in_operations_with_whether_it_is_retried() -> None:
    from airflow.sdk import RetryAction

    from airflow_ai_provider.retry import RETRY_POLICY

    rows = table_rows(DOCS / "operations.md")
    for name, kind in vars(errors).items():
        roots = {errors.AiProviderError, errors.TransientError, errors.TerminalError}
        if not (isinstance(kind, type) and issubclass(kind, errors.AiProviderError)) or kind in roots:
            continue
        assert name in rows, f"{name} is not in docs/operations.md"
        raised = kind("m", [ValueError()]) if issubclass(kind, ExceptionGroup) else kind("m")
        retried = RETRY_POLICY.evaluate(raised, 1, 4).action is not RetryAction.FAIL
        assert rows[name][0] == ("yes" if retried else "no"), name


def test_no_page_names_an_error_that_is_not_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`([A-Z]\w+Error)`", read(page)):
            assert hasattr(errors, name), f"{page.name} names {name}"


def test_every_connection_type_and_field_is_in_the_page_and_in_the_readme() -> None:
    said = read(DOCS / "connections.md")
    for kind in get_provider_info()["connection-types"]:
        assert f"`{kind['connection-type']}`" in said and f"`{kind['connection-type']}`" in read(ROOT / "README.md")
        for field in kind["conn-fields"]:
            assert f"`{field}`" in said, f"{kind['connection-type']}.{field} is not in docs/connections.md"


def test_every_option_of_the_configuration_is_in_the_page_with_its_default() -> None:
    rows = table_rows(DOCS / "scale.md")
    for section_ in get_provider_info()["config"].values():
        for name, option in section_["options"].items():
            assert name in rows, f"{name} is not in docs/scale.md"
            assert not option["default"] or rows[name][0] == f"`{option['default']}`", name


def test_every_command_of_ours_is_in_the_documents() -> None:
    from airflow_ai_provider.cli import get_cli_commands

    said = "".join(read(page) for page in PAGES)
    for group in get_cli_commands():
        for command in group.subcommands:
            assert f"airflow {group.name} {command.name}" in said, command.name


def test_every_fake_is_in_the_page() -> None:
    from airflow_ai_provider import testing

    said = read(DOCS / "testing.md")
    assert [name for name in testing.__all__ if f"`{name}`" not in said] == []


def test_every_extra_for_users_is_in_the_readme() -> None:
    config = read(ROOT / "setup.cfg").partition("[options.extras_require]")[2]
    extras = set(re.findall(r"^([a-z0-9-]+) =$", config, re.MULTILINE)) - {"demo", "test", "bench"}
    said = read(ROOT / "README.md")
    assert [extra for extra in sorted(extras) if f"`{extra}`" not in said] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}; there are {sorted(anchors(found))}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+\.md)(?:#[^)]*)?\)", prose(page)):
            found = (page.parent / target).resolve()
            if found not in seen:
                todo.append(found)
    assert not set(PAGES) - seen


def test_the_picture_is_drawn_and_says_what_it_shows() -> None:
    root = ElementTree.fromstring(read(DOCS / "flow.svg"))
    words = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("text"))
    for word in ("ingest", "quarantine", "pin", "infer", "decide", "act", "review", "fallback", "hold", "ledger"):
        assert word in words
    assert root.find("{http://www.w3.org/2000/svg}title") is not None


def test_the_documents_name_no_machine_and_no_figure_without_its_source() -> None:
    for page in PAGES:
        said = read(page)
        assert not re.search(r"(?<![\w.])/(work|root|home|tmp/brief)/", said), page
        assert not re.search(r"pypi\.org|maven\.org|pythonhosted|deb\.debian", said), page
        measured = re.findall(r"\d[\d.,]* ?(?:rows|messages|requests)/s\b", said)
        assert not measured or "benchmarks/RESULTS.md" in said, f"{page.name}: {measured}"


def test_blocks_of_python_have_room_on_a_page() -> None:
    """The ten lines of the README are ten on purpose; everywhere else a line fits."""
    for block in blocks("python"):
        if block.page != "README.md":
            assert max(map(len, block.text.splitlines())) <= 120, str(block)
