"""One DAG for each file in ``pipelines/``: the file's name is the DAG's id."""

from __future__ import annotations

from pathlib import Path

from airflow_ai_provider import load_pipelines

globals().update(load_pipelines(Path(__file__).with_name("pipelines")))
