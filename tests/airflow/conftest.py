"""Commands through Airflow's own parser, with a store and a ledger of the test's own behind the default connections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_ai_provider.core.ledger import Ledger
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store


@pytest.fixture
def ai(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs one command and gives exit status, stdout, stderr."""
    from airflow.cli.cli_parser import get_parser

    def run(*words: str) -> tuple[int, str, str]:
        args = get_parser().parse_args(["ai", *words])
        capsys.readouterr()  # what fixtures have logged is no output of the command
        try:
            args.func(args)
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Ledger]:
    """The store and the ledger that the commands find."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    for kind, extra in (("ai_store", {"uri": f"{tmp_path}/store"}), ("ai_ledger", {"url": url})):
        monkeypatch.setenv(f"AIRFLOW_CONN_{kind.upper()}_DEFAULT", json.dumps({"conn_type": kind, "extra": extra}))
    return Store(f"{tmp_path}/store"), open_ledger(url)
