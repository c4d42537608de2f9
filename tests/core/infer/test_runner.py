"""The value that says how a batch is predicted."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_ai_provider.core.infer.runner import FIELDS, Runner
from airflow_ai_provider.errors import SpecError


def test_what_was_written_is_read_again() -> None:
    cluster = Runner(engine="ray", cluster="auto", workers=3)
    for runner in (
        Runner(),
        Runner(64),
        Runner(precision="float16", compile=True),
        Runner(endpoint="triton"),
        Runner(1, "triton"),
        cluster,
    ):
        assert Runner.from_dict(runner.to_dict()) == runner
        assert Runner.from_dict(runner.to_dict()).digest == runner.digest
    assert Runner(64).digest != Runner(65).digest
    assert set(Runner().to_dict()) == set(FIELDS)


def test_a_mapping_may_hold_what_templates_render() -> None:
    assert Runner.from_dict({"batch_size": "64", "endpoint": ""}) == Runner(64)
    assert Runner.from_dict({"batch_size": "None", "endpoint": None}) == Runner()
    assert Runner.from_dict({"compile": "True", "precision": "None"}) == Runner(compile=True)


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ({"batch_size": 0}, ["batch_size"]),
        ({"batch_size": True}, ["batch_size"]),
        ({"batch_size": "many"}, ["batch_size"]),
        ({"batch_size": 2.5, "endpoint": " "}, ["batch_size", "endpoint"]),
        ({"endpoint": 3}, ["endpoint"]),
        ({"batchsize": 3}, ["batchsize"]),
        ({"engine": "dask"}, ["engine"]),
        ({"engine": "spark", "cluster": "sc://head/;token=s3cret"}, ["cluster"]),
        ({"cluster": "auto", "workers": "2"}, ["cluster", "workers"]),
        ({"engine": "ray", "endpoint": "triton"}, ["endpoint"]),
        ({"engine": "spark", "cluster": " ", "workers": 0}, ["cluster", "workers"]),
        ({"precision": "int8", "compile": "yes"}, ["precision", "compile"]),
        ({"precision": "float32", "endpoint": "triton"}, ["precision"]),
        ({"precision": "float16", "compile": True, "endpoint": "triton"}, ["precision", "compile"]),
        (["batch_size"], [""]),
    ],
)
def test_a_runner_that_cannot_run_is_refused_with_every_fault(given: Any, paths: list[str]) -> None:
    with pytest.raises(SpecError, match="this runner cannot be run") as caught:
        Runner.from_dict(given)
    assert [path for path, _ in caught.value.faults] == paths
    assert "s3cret" not in str(caught.value)
