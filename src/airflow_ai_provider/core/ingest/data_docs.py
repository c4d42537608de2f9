"""Great Expectations' own Data Docs of a batch, landed or refused: what was broken how often, with examples.

Invariants: a page is made of what the batch holds and of the suite, so the same batch gives the same bytes; it is no
part of the batch: no digest covers it, and a batch without it is whole; what a row says reaches the page escaped.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from html import escape
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read on import; it reports to its maker otherwise

import great_expectations
from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer
from great_expectations.render.view.view import DefaultJinjaPageView

from airflow_ai_provider.core.batch import QUARANTINE, BatchRef, Manifest
from airflow_ai_provider.core.ingest.contract import REASONS, STAGE
from airflow_ai_provider.core.ingest.rule_text import Finder
from airflow_ai_provider.core.ingest.suite import OF_TYPE, Rule, Suite
from airflow_ai_provider.core.store import Store

PAGE = "docs/index.html"
_EXAMPLES = 20
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_CLOCK = re.compile(r"\?d=[0-9T.]+Z")


def write_data_docs(store: Store, ref: BatchRef, suite: Suite, refused: Manifest | None = None) -> str:
    """Write a batch's page into its folder; written again, it has the same bytes.

    :param ref: a batch of ingest, landed, or what a refused one would have been.
    :param suite: the suite that it was judged by.
    :param refused: the manifest that a refused batch would have had; None: the batch is landed, and has one.
    :return: the page's URI.
    :raises SourceUnavailableError: when the store does not answer; a retry may help.
    """
    page = render_data_docs(store, ref, suite, refused or store.manifest(ref))
    path = f"{ref.uri[len(store.root) + 1 :]}/{PAGE}"
    store.write_bytes(path, page.encode())
    return f"{store.root}/{path}"


def render_data_docs(store: Store, ref: BatchRef, suite: Suite, manifest: Manifest) -> str:
    """Return the page, as HTML."""
    tally = _Tally(suite)
    for reasons, stage in _rejected(store, ref, manifest):
        tally.add(reasons, stage)
    results = [_result(rule, tally, manifest) for rule in tally.rules]
    good = sum(bool(result.success) for result in results)
    statistics = {
        "evaluated_expectations": len(results),
        "successful_expectations": good,
        "unsuccessful_expectations": len(results) - good,
        "success_percent": 100 * good / len(results) if results else None,
    }
    result = ExpectationSuiteValidationResult(
        success=good == len(results),
        results=results,
        suite_name=suite.name,
        statistics=statistics,
        meta={
            "run_id": ref.batch_id,
            "great_expectations_version": great_expectations.__version__,
            "batch_markers": _markers(manifest),
            "batch_spec": _origin(manifest),
        },
    )
    renderer: Any = ValidationResultsPageRenderer()  # neither has types
    view: Any = DefaultJinjaPageView()
    return _steady(view.render(renderer.render(result)))


class _Tally:
    """Count, per rule, the rows that broke it, and keep the first examples.

    :param suite: the rules, and the row schema, whose columns are rules too.
    """

    def __init__(self, suite: Suite) -> None:
        types = [Rule("", OF_TYPE, {"column": c, "type_": t}, None) for c, t in suite.types.items()]
        self.rules = [*types, *suite.rules]
        self._find = Finder(self.rules)
        self.broken: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.undecoded = 0

    def add(self, reasons: list[str], stage: str) -> None:
        self.undecoded += stage == "decode"
        for text in reasons:
            found = self._find(text)
            if found is None:
                continue  # a row that was no JSON at all: no expectation says so
            rule, value = found
            self.broken[rule.place or str(rule)] += 1
            shown = self.examples[rule.place or str(rule)]
            if len(shown) < _EXAMPLES:
                shown.append(escape(value))


def _rejected(store: Store, ref: BatchRef, manifest: Manifest) -> Iterator[tuple[list[str], str]]:
    for part in manifest.table(QUARANTINE):
        table = store.read_part(ref, part, [REASONS, STAGE])
        yield from zip(table[REASONS].to_pylist(), table[STAGE].to_pylist(), strict=True)


def _result(rule: Rule, tally: _Tally, manifest: Manifest) -> ExpectationValidationResult:
    warned = manifest.facts.get("warnings", {})
    key = rule.place or str(rule)
    broken = tally.broken[key]
    holds = not broken
    if rule.on_failure == "warn" and str(rule) in warned:
        broken, holds = int(warned[str(rule)]), False
    failed = [text for text in manifest.facts.get("failures", ()) if text.startswith(str(rule))]
    holds = holds and not failed
    read = manifest.counts["read"]
    judged = read if rule.type == OF_TYPE else read - tally.undecoded
    result: dict[str, Any] = {"element_count": judged}
    if broken:
        share = 100 * broken / judged
        result |= {"unexpected_count": broken, "unexpected_percent": share, "unexpected_percent_total": share}
        result["partial_unexpected_list"] = tally.examples[key]
    if failed:
        result["observed_value"] = escape(
            failed[0].removeprefix(str(rule)).removeprefix(" (observed ").removesuffix(")")
        )
    config = ExpectationConfiguration(type=rule.type, kwargs=dict(rule.kwargs))
    return ExpectationValidationResult(success=holds, expectation_config=config, result=result)


def _markers(manifest: Manifest) -> dict[str, Any]:
    refused = {"refused": escape(manifest.facts["refused"])} if "refused" in manifest.facts else {}
    return {
        **refused,
        **manifest.counts,
        **{escape(code): count for code, count in manifest.facts.get("reasons", {}).items()},
    }


def _origin(manifest: Manifest) -> dict[str, Any]:
    span = manifest.facts.get("span") or {}
    slices = [f"{s['partition']}: {s['first']} to {s['end']}" for s in span.get("slices", ())[:_EXAMPLES]]
    return {"data_asset_name": escape(str(span.get("source", ""))), "slices": [escape(text) for text in slices]}


def _steady(page: str) -> str:
    """Take clock and chance out of a page: the ids of its blocks are numbered, its logo's date is dropped."""
    numbers: dict[str, str] = {}
    page = _UUID.sub(lambda found: numbers.setdefault(found[0], f"block-{len(numbers)}"), page)
    return _CLOCK.sub("", page)
